"""Proof that a layout holds its source: structure, digests, and every source tensor compared byte for byte.

The full check reads each side once: the layout in file order, taking its digest on the way, and the source beside it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.header import Header, TensorEntry
from neuralink_cli.checkpoint.regions import Region, Slab
from neuralink_cli.errors import MismatchError, VerificationError
from neuralink_cli.flash.bundled_layout import BundledLayout, SourcePiece
from neuralink_cli.flash.companions import check_companions
from neuralink_cli.flash.layouts import Layout, check_digest
from neuralink_cli.flash.permuted_layout import PermutedLayout
from neuralink_cli.placement.placement import Order, inverse

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], object] | None
_CHUNK = 1 << 24


@dataclass(frozen=True)
class VerifyReport:
    """What was checked: `checks` in words, tensors and bytes compared with the source."""

    layout: str
    mode: str
    checks: tuple[str, ...]
    tensors: int
    bytes: int


def verify_quick(layout: Layout, checkpoint: Checkpoint) -> VerifyReport:
    """Check structure only: schema, header, ranges, alignment, permutations, digests of small tensors, tensor lists.

    Most of it has been done when the layout was opened.

    Raises:
        MismatchError: `checkpoint` is not the source of the layout.
        VerificationError: With what is wrong and where.
    """
    if layout.fingerprint != checkpoint.fingerprint:
        raise MismatchError(
            f"was made from the model with fingerprint {layout.fingerprint[:12]}, "
            f"but {checkpoint.directory} has {checkpoint.fingerprint[:12]}",
            where=layout.directory,
        )
    _compare_tensor_lists(layout.source_headers, checkpoint, layout.directory)
    check_companions(layout.directory, layout.companions)
    checks = ["index against schema", "header and ranges", "orders are permutations", "tensor list of the source"]
    checks.append("config, tokenizer and other small files")
    if isinstance(layout, BundledLayout):
        layout.check_digests()
        checks += ["alignment", "digests of small tensors"]
    return VerifyReport(_kind(layout), "quick", tuple(checks), 0, 0)


def verify_full(layout: Layout, checkpoint: Checkpoint, progress: Progress = None) -> VerifyReport:
    """As `verify_quick`, and every byte: file digests, and each source tensor made again and compared.

    Args:
        progress: Called with the layout bytes checked since the last call.

    Raises:
        MismatchError: `checkpoint` is not the source of the layout.
        VerificationError: With the tensor, and the neuron if it is one's.
    """
    quick = verify_quick(layout, checkpoint)
    comparison = _Comparison(layout, checkpoint)
    if isinstance(layout, BundledLayout):
        _verify_bundled(layout, comparison, progress)
    else:
        _verify_permuted(layout, comparison, progress)
    comparison.require_all()
    checks = (*quick.checks, "file digests", "every source tensor byte for byte")
    return VerifyReport(quick.layout, "full", checks, len(checkpoint.tensors), checkpoint.total_bytes)


def layout_bytes(layout: Layout) -> int:
    """Bytes that `verify_full` reads from the layout's weight files."""
    if isinstance(layout, BundledLayout):
        return layout.file.header.data_bytes
    return sum(file.header.data_bytes for file in layout.checkpoint.files)


def _kind(layout: Layout) -> str:
    return "bundled" if isinstance(layout, BundledLayout) else "permuted"


def _compare_tensor_lists(headers: dict[str, Header], checkpoint: Checkpoint, where: Path) -> None:
    stated = {entry.name: (entry.dtype, entry.shape) for header in headers.values() for entry in header.entries}
    found = {name: (place.entry.dtype, place.entry.shape) for name, place in checkpoint.tensors.items()}
    if stated != found:
        name = sorted(dict(set(stated.items()) ^ set(found.items())))[0]
        ours, theirs = stated.get(name, "missing"), found.get(name, "missing")
        raise VerificationError(f"tensor {name!r} is {ours} in the layout, {theirs} in the source", where=where)


class _Comparison:
    """Compares what a layout makes with the source, and keeps count of how much of each tensor has been compared."""

    def __init__(self, layout: Layout, checkpoint: Checkpoint) -> None:
        self._layout = layout
        self._checkpoint = checkpoint
        self._compared: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def compare(self, name: str, start: int, data: Bytes) -> None:
        """Compare bytes of a source tensor, from byte `start` on.

        Raises:
            VerificationError: They differ.
        """
        source = self._checkpoint.place(name).file.read(name, start, start + data.nbytes)
        if not np.array_equal(data, source):
            byte = start + int(np.flatnonzero(data != source)[0])
            raise VerificationError(
                f"tensor {name!r} differs from the source at byte {byte}{_neuron_at(self._layout, name, byte)}",
                where=self._layout.directory,
            )
        self._compared[name] += data.nbytes

    def require_all(self) -> None:
        """Require that every byte of the source was compared.

        Raises:
            VerificationError: One was not.
        """
        for name, place in self._checkpoint.tensors.items():
            if self._compared[name] != place.entry.nbytes:
                raise VerificationError(f"source tensor {name!r} is not in the layout", where=self._layout.directory)


def _verify_bundled(layout: BundledLayout, comparison: _Comparison, progress: Progress) -> None:
    digest = hashlib.sha256(layout.file.header.prelude)
    blocks = {block.bundles.tensor: block for block in layout.index.blocks}
    made_of: dict[str, list[tuple[str, Slab[SourcePiece]]]] = {}
    for name, slabs in layout.made_slabs.items():
        for slab in slabs:
            made_of.setdefault(slab.pieces[0].block.id, []).append((name, slab))
    for entry in layout.file.header.entries:
        if entry.name in blocks:
            block = blocks[entry.name]
            digest.update(layout.bundles(block).data)
            for name, slab in made_of.get(block.id, ()):
                comparison.compare(name, slab.start, layout.made_slab(slab))
        else:
            for chunk, start in _chunks(layout, entry):
                digest.update(chunk.data)
                if entry.name in comparison and entry.name not in layout.made_slabs:
                    comparison.compare(entry.name, start, chunk)
                elif entry.name.startswith("padding.") and chunk.any():
                    raise VerificationError(f"{entry.name} is not zero", where=layout.file.path)
        if progress is not None:
            progress(entry.nbytes)
    check_digest(layout.file, digest.hexdigest(), layout.index.file_sha256)


def _verify_permuted(layout: PermutedLayout, comparison: _Comparison, progress: Progress) -> None:
    for file in layout.checkpoint.files:
        digest = hashlib.sha256(file.header.prelude)
        for entry in file.header.entries:
            if entry.name in layout.moved_slabs:
                for slab in layout.moved_slabs[entry.name]:
                    data = file.read(entry.name, slab.start, slab.stop)
                    digest.update(data.data)
                    comparison.compare(entry.name, slab.start, layout.unpermuted(entry.name, slab, data))
            else:
                start = 0
                for chunk in layout.source_chunks(entry.name):
                    digest.update(chunk.data)
                    comparison.compare(entry.name, start, chunk)
                    start += chunk.nbytes
            if progress is not None:
                progress(entry.nbytes)
        check_digest(file, digest.hexdigest(), layout.file_digests[file.path.name])


def _chunks(layout: BundledLayout, entry: TensorEntry) -> Iterator[tuple[Bytes, int]]:
    for start in range(0, entry.nbytes, _CHUNK):
        yield layout.file.read(entry.name, start, min(start + _CHUNK, entry.nbytes)), start


def _neuron_at(layout: Layout, name: str, byte: int) -> str:
    """Names the neuron that a byte of a source tensor belongs to, if it belongs to one."""
    for block, region, order in _regions(layout, name):
        place = region.line_at(byte)
        if place is not None:
            line, within = place
            neuron = line if region.neuron_axis == 0 else within * order.size // region.line_bytes
            return f": {block}, neuron {neuron}, slot {int(inverse(order)[neuron])}"
    return ""


def _regions(layout: Layout, name: str) -> Iterator[tuple[str, Region, Order]]:
    """The blocks that have neurons in a tensor, with where, and their orders."""
    if isinstance(layout, BundledLayout):
        for slab in layout.made_slabs.get(name, ()):
            yield from ((p.block.id, p.region, layout.orders[p.block.id]) for p in slab.pieces)
    else:
        for moved in layout.moved_slabs.get(name, ()):
            yield from ((p.block, p.region, layout.order(p.block)) for p in moved.pieces)
