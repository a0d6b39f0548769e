"""Proof that a layout holds its source: structure, digests, and every source tensor compared byte for byte.

The full check reads each side once: the layout in file order, taking its digest on the way, and the source beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.header import DTYPE_BITS, Header, TensorEntry
from neuralink_cli.errors import MismatchError, VerificationError
from neuralink_cli.flash.bundled_layout import BundledLayout
from neuralink_cli.flash.companions import check_companions
from neuralink_cli.flash.layouts import Layout, check_digest
from neuralink_cli.flash.permuted_layout import PermutedLayout
from neuralink_cli.placement.placement import inverse

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
    if isinstance(layout, BundledLayout):
        seen = _verify_bundled(layout, checkpoint, progress)
    else:
        seen = _verify_permuted(layout, checkpoint, progress)
    missing = sorted(set(checkpoint.tensors) - seen)
    if missing:
        raise VerificationError(f"source tensor {missing[0]!r} is not in the layout", where=layout.directory)
    checks = (*quick.checks, "file digests", "every source tensor byte for byte")
    return VerifyReport(quick.layout, "full", checks, len(seen), checkpoint.total_bytes)


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


def _verify_bundled(layout: BundledLayout, checkpoint: Checkpoint, progress: Progress) -> set[str]:
    digest = hashlib.sha256(layout.file.header.prelude)
    blocks = {block.bundles.tensor: block for block in layout.index.blocks}
    resident = {s.resident.place.tensor: name for name, s in layout.made_tensors.items() if s.resident is not None}
    seen: set[str] = set()
    for entry in layout.file.header.entries:
        if entry.name in blocks:
            block = blocks[entry.name]
            digest.update(layout.bundles(block).data)
            sources = [part.source for part in block.parts]
        else:
            sources = [resident[entry.name]] if entry.name in resident else []
            for chunk, start in _chunks(layout, entry):
                digest.update(chunk.data)
                if entry.name in checkpoint and not sources:
                    _compare(chunk, checkpoint, entry.name, start, layout)
                    seen.add(entry.name)
                elif entry.name.startswith("padding.") and chunk.any():
                    raise VerificationError(f"{entry.name} is not zero", where=layout.file.path)
        for name in sources:
            _compare(layout.made_tensor(name), checkpoint, name, 0, layout)
            seen.add(name)
        if entry.name in checkpoint and entry.nbytes == 0:
            seen.add(entry.name)
        if progress is not None:
            progress(entry.nbytes)
    check_digest(layout.file, digest.hexdigest(), layout.index.file_sha256)
    return seen


def _verify_permuted(layout: PermutedLayout, checkpoint: Checkpoint, progress: Progress) -> set[str]:
    seen: set[str] = set()
    for file in layout.checkpoint.files:
        digest = hashlib.sha256(file.header.prelude)
        for entry in file.header.entries:
            if entry.name in layout.moved:
                data = file.read(entry.name)
                digest.update(data.data)
                _compare(layout.unpermuted(entry.name, data), checkpoint, entry.name, 0, layout)
            else:
                start = 0
                for chunk in layout.source_chunks(entry.name):
                    digest.update(chunk.data)
                    _compare(chunk, checkpoint, entry.name, start, layout)
                    start += chunk.nbytes
            seen.add(entry.name)
            if progress is not None:
                progress(entry.nbytes)
        check_digest(file, digest.hexdigest(), layout.file_digests[file.path.name])
    return seen


def _chunks(layout: BundledLayout, entry: TensorEntry) -> Iterator[tuple[Bytes, int]]:
    for start in range(0, entry.nbytes, _CHUNK):
        yield layout.file.read(entry.name, start, min(start + _CHUNK, entry.nbytes)), start


def _compare(data: Bytes, checkpoint: Checkpoint, name: str, start: int, layout: Layout) -> None:
    source = checkpoint.place(name).file.read(name, start, start + data.nbytes)
    if np.array_equal(data, source):
        return
    byte = start + int(np.flatnonzero(data != source)[0])
    raise VerificationError(
        f"tensor {name!r} differs from the source at byte {byte}{_neuron_at(layout, checkpoint, name, byte)}",
        where=layout.directory,
    )


def _neuron_at(layout: Layout, checkpoint: Checkpoint, name: str, byte: int) -> str:
    """Names the neuron that a byte of a source tensor belongs to, if it belongs to one."""
    entry = checkpoint.place(name).entry
    element = byte // (DTYPE_BITS[entry.dtype] // 8 or 1)
    if isinstance(layout, BundledLayout):
        if name not in layout.made_tensors:
            return ""
        made = layout.made_tensors[name]
        block, order, axis = made.block.id, layout.orders[made.block.id], made.neuron_axis
    else:
        if name not in layout.moved:
            return ""
        order, axis = layout.moved[name]
        block = next(block["id"] for block in layout.index["blocks"] if name in block["tensors"])
    neuron = (
        element % order.size if axis == 1 else element // (entry.nbytes * 8 // DTYPE_BITS[entry.dtype] // order.size)
    )
    return f": {block}, neuron {neuron}, slot {int(inverse(order)[neuron])}"
