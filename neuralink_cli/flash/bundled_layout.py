"""An open bundled layout: its index and file checked against each other, and its source tensors made again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.checkpoint.header import DTYPE_BITS, LENGTH_BYTES, Header, parse_header
from neuralink_cli.checkpoint.tensor_file import TensorFile
from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.flash.index import read_flash_index
from neuralink_cli.flash.plan import FLASH_FILE, FlashBlock, ResidentTensor, TensorRange
from neuralink_cli.placement.placement import Order, inverse, is_permutation

Bytes = npt.NDArray[np.uint8]
_CHUNK = 1 << 24


@dataclass(frozen=True)
class SourceTensor:
    """How a tensor of the source is made again: from a resident tensor, or else from `offset` of each bundle."""

    block: FlashBlock
    neuron_axis: int
    offset: int = 0
    resident: ResidentTensor | None = None

    @property
    def dtype(self) -> str:
        """Its dtype."""
        return self.block.dtype if self.resident is None else self.resident.place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the source."""
        if self.resident is not None and self.resident.kind == "bias":
            return (self.block.neurons,)
        shape = (self.block.neurons, self.block.hidden)
        return shape if self.neuron_axis == 0 else shape[::-1]


class BundledLayout:
    """Reads a bundled layout. Use as a context manager.

    Raises:
        InputError: Index or file is missing or malformed.
        VerificationError: Index and file do not fit each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = read_flash_index(directory)
        self.file = TensorFile(directory / FLASH_FILE)
        self._last_bundles: tuple[str, Bytes] | None = None
        try:
            self._check_ranges()
            self._check_sources()
            self.orders = {block.id: self._order(block) for block in self.index.blocks}
        except (InputError, VerificationError):
            self.file.close()
            raise

    def __enter__(self) -> BundledLayout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    @cached_property
    def made_tensors(self) -> dict[str, SourceTensor]:
        """The source tensors that the layout holds in another form, by name."""
        made = {}
        for block in self.index.blocks:
            for part in block.parts:
                made[part.source] = SourceTensor(block, part.neuron_axis, offset=part.offset)
            for resident in block.resident:
                if resident.kind != "output_bias":
                    made[resident.source] = SourceTensor(block, resident.neuron_axis, resident=resident)
        return made

    @cached_property
    def source_headers(self) -> dict[str, Header]:
        """The headers of the source's weight files, by file name."""
        headers = {}
        for source in self.index.sources:
            if source.kind == "weights":
                prelude = self.file.read(source.stored.tensor).tobytes()
                where = f"{self.file.path}: {source.stored.tensor}"
                headers[source.name] = parse_header(prelude[LENGTH_BYTES:], source.bytes - len(prelude), where)
        return headers

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source checkpoint."""
        return self.index.fingerprint

    @property
    def companions(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of the small files of the layout."""
        return list(self.index.document["companions"])

    @property
    def verbatim(self) -> dict[str, bytes]:
        """Contents of the source's files that the layout does not have under their own name."""
        sources = [source for source in self.index.sources if source.kind == "verbatim"]
        return {source.name: self.file.read(source.stored.tensor).tobytes() for source in sources}

    def source_chunks(self, name: str) -> Iterator[Bytes]:
        """The bytes of a source tensor, as they were in the source checkpoint."""
        if name in self.made_tensors:
            yield self.made_tensor(name)
            return
        nbytes = self.file.entry(name).nbytes
        for start in range(0, nbytes, _CHUNK):
            yield self.file.read(name, start, min(start + _CHUNK, nbytes))

    def made_tensor(self, name: str) -> Bytes:
        """All bytes of a source tensor that is a key of `made_tensors`; the last block's bundles stay in memory."""
        # Imported here because numba takes time that a quick look at a layout does not need.
        from neuralink_cli.flash.bundling import permute_neurons, scatter_part

        source = self.made_tensors[name]
        block, order = source.block, self.orders[source.block.id]
        if source.resident is None:
            element_bytes = DTYPE_BITS[block.dtype] // 8
            matrix = np.empty(block.neurons * block.hidden * element_bytes, dtype=np.uint8)
            bundles = self.bundles(block)
            scatter_part(bundles, block.stride, source.offset, order, source.neuron_axis, element_bytes, matrix)
            return matrix
        data = self.file.read(source.resident.place.tensor)
        element_bytes = DTYPE_BITS[source.resident.place.dtype] // 8
        if source.resident.kind == "bias":
            return permute_neurons(data, inverse(order), 0, element_bytes)
        matrix = np.empty_like(data)
        scatter_part(data, data.size // order.size, 0, order, source.neuron_axis, element_bytes, matrix)
        return matrix

    def bundles(self, block: FlashBlock) -> Bytes:
        """All bundles of a block, uint8 `[n * stride]`."""
        if self._last_bundles is None or self._last_bundles[0] != block.id:
            self._last_bundles = None
            self._last_bundles = (block.id, self.file.read(block.bundles.tensor))
        return self._last_bundles[1]

    def check_digests(self) -> None:
        """Compare the small tensors with their digests in the index.

        Raises:
            VerificationError: One of them was changed.
        """
        for name, expected in self.index.digests.items():
            if name not in self.file:
                raise VerificationError(f"tensor {name!r} is missing", where=self.file.path)
            if hashlib.sha256(self.file.read(name).data).hexdigest() != expected:
                raise VerificationError(f"tensor {name!r} does not match its digest in the index", where=self.file.path)

    def _check_ranges(self) -> None:
        index, file = self.index, self.file
        if file.size != index.file_bytes:
            raise VerificationError(f"has {file.size:,} bytes, the index says {index.file_bytes:,}", where=file.path)
        for block in index.blocks:
            self._check_block(block)
            for place in (block.bundles, block.order, block.frequency, *(r.place for r in block.resident)):
                self._check_range(place)
        for source in index.sources:
            self._check_range(source.stored)
            if source.kind == "verbatim" and source.stored.bytes != source.bytes:
                raise VerificationError(f"{source.name} is not stored whole", where=self.directory)

    def _check_range(self, place: TensorRange) -> None:
        entry = self.file.entry(place.tensor)
        start = self.file.header.data_start + entry.start
        found = TensorRange(entry.name, start, entry.nbytes, entry.dtype, entry.shape)
        if found != place:
            raise VerificationError(
                f"index and file disagree on tensor {place.tensor!r}: {place} in the index, {found} in the file",
                where=self.directory,
            )

    def _check_block(self, block: FlashBlock) -> None:
        if block.bundles.offset % self.index.alignment:
            raise VerificationError(
                f"bundles of {block.id} start at {block.bundles.offset}, not on a multiple of {self.index.alignment}",
                where=self.directory,
            )
        part_bytes = block.hidden * DTYPE_BITS.get(block.dtype, 0) // 8
        offsets = [(part.offset, part.bytes) for part in block.parts]
        expected = [(k * part_bytes, part_bytes) for k in range(len(block.parts))]
        sizes = (block.stride, block.bundles.bytes, block.bundles.dtype)
        if offsets != expected or sizes != (
            len(block.parts) * part_bytes,
            block.neurons * block.stride,
            block.dtype,
        ):
            raise VerificationError(f"stride and parts of {block.id} do not fit its bundles", where=self.directory)
        for place, dtype in ((block.order, "I32"), (block.frequency, "F32")):
            self._check_place(place, dtype, (block.neurons,))
        if block.pinned > block.neurons:
            raise VerificationError(f"{block.id} has more pinned slots than neurons", where=self.directory)
        wanted = {"rows": (block.neurons, block.hidden), "bias": (block.neurons,), "output_bias": (block.hidden,)}
        for resident in block.resident:
            dtype = block.dtype if resident.kind == "rows" else resident.place.dtype
            self._check_place(resident.place, dtype, wanted[resident.kind])
            if resident.kind == "output_bias" and resident.place.tensor != resident.source:
                raise VerificationError(
                    f"{block.id} takes {resident.place.tensor!r} for {resident.source!r}", where=self.directory
                )

    def _check_place(self, place: TensorRange, dtype: str, shape: tuple[int, ...]) -> None:
        if (place.dtype, place.shape) != (dtype, shape):
            raise VerificationError(
                f"tensor {place.tensor!r} is {place.dtype} {list(place.shape)}, not {dtype} {list(shape)}",
                where=self.directory,
            )

    def _check_sources(self) -> None:
        """Check that every tensor of the source is there, in its own form or in one that it can be made from."""
        stated = {entry.name: entry for header in self.source_headers.values() for entry in header.entries}
        for name, made in self.made_tensors.items():
            form = (made.dtype, made.shape)
            if name not in stated or (stated[name].dtype, stated[name].shape) != form or DTYPE_BITS[made.dtype] % 8:
                raise VerificationError(
                    f"{made.block.id} makes tensor {name!r} {made.dtype} {list(made.shape)}, which the source has not",
                    where=self.directory,
                )
        for name in sorted(stated.keys() - self.made_tensors.keys()):
            kept = self.file.entry(name)
            if (kept.dtype, kept.shape) != (stated[name].dtype, stated[name].shape):
                raise VerificationError(
                    f"tensor {name!r} is {kept.dtype} {list(kept.shape)}, "
                    f"in the source {stated[name].dtype} {list(stated[name].shape)}",
                    where=self.file.path,
                )

    def _order(self, block: FlashBlock) -> Order:
        data = self.file.read(block.order.tensor)
        order = data.view("<i4") if block.order.dtype == "I32" and data.size % 4 == 0 else np.zeros(0, dtype=np.int32)
        if not is_permutation(order, block.neurons):
            raise VerificationError(f"{block.order.tensor} is not a permutation", where=self.file.path)
        return order
