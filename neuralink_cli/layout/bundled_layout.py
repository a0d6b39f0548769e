"""Opens a bundled layout: checks its index and file against each other, and rebuilds its source tensors."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

import numpy as np

from neuralink_cli.architectures.blocks import MovedPiece
from neuralink_cli.architectures.regions import Region, Slab, cut_into_slabs
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.calibration.digests import DIGEST_BYTES
from neuralink_cli.checkpoint.checkpoint import TensorPlace
from neuralink_cli.checkpoint.config import stated_quantization
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.checkpoint.mxfp4_stacks import find_stacks
from neuralink_cli.checkpoint.packed_tensors import (
    PackedTensor,
    as_unpacked,
    find_packed_tensors,
    may_be_packed,
    shapes_of,
)
from neuralink_cli.checkpoint.scaled_tensors import Shape, find_scaled_tensors
from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.files.header import DTYPE_BITS, LENGTH_BYTES, Header, TensorEntry, parse_header
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.gathering import Gathering, gatherings_of
from neuralink_cli.layout.index import read_flash_index
from neuralink_cli.layout.names import FLASH_FILE
from neuralink_cli.layout.plan import (
    BundlePart,
    DenseTensor,
    FlashBlock,
    ResidentTensor,
    SourceMatrix,
    SourcePiece,
    TensorRange,
)
from neuralink_cli.layout.replaced import Unreplaced
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, is_permutation
from neuralink_cli.weight_formats.formats import (
    MXFP4,
    ROUNDING_FORMATS,
    SCALED_DTYPES,
    SOURCE,
    part_bytes,
    require_convertible,
)


class BundledLayout:
    """Reads a bundled layout. Use as a context manager.

    Attributes:
        kind: Tells the kinds of layout apart.
        unreplaced: Watches that the directory stays the one that was opened.
        loadable: Whether transformers can load it as it is.
        moved_slabs: The source tensors whose neurons are only moved: none, as bundles are another form.

    Raises:
        InputError: Index or file is missing or malformed.
        VerificationError: Index and file do not fit each other.
    """

    kind: Literal["bundled"] = "bundled"
    loadable = False
    moved_slabs: Mapping[str, tuple[Slab[MovedPiece], ...]] = MappingProxyType({})

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.unreplaced = Unreplaced(directory)
        self.index = read_flash_index(directory)
        self.file = TensorFile(directory / FLASH_FILE)
        try:
            self._check_ranges()
            self._check_sources()
            self._orders = {block.id: self._read_order(block) for block in self.index.blocks}
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
    def made_slabs(self) -> dict[str, tuple[Slab[SourcePiece], ...]]:
        """The source tensors that the layout holds in another form, by name, in stretches made of whole pieces.

        Raises:
            VerificationError: A tensor cannot be rebuilt whole, or the source does not have it.
        """
        stated = {entry.name: entry for entries in self.source_entries.values() for entry in entries}
        pieces: dict[str, list[SourcePiece]] = {}
        for piece in self._pieces():
            pieces.setdefault(piece.part.source, []).append(piece)
        made = {}
        for name, found in pieces.items():
            if name not in stated or {piece.dtype for piece in found} != {stated[name].dtype}:
                raise VerificationError(
                    f"{found[0].block.id} gives tensor {name!r} as {found[0].dtype}, which the source does not have",
                    where=self.directory,
                )
            made[name] = self._cut(name, found, stated[name].nbytes)
        return made

    def _pieces(self) -> Iterator[SourcePiece]:
        for block in self.index.blocks:
            yield from (SourcePiece(block, part) for part in block.parts)
            yield from (SourcePiece(block, kept) for kept in block.resident if kept.kind != "output_bias")

    def _cut(self, name: str, pieces: list[SourcePiece], nbytes: int) -> tuple[Slab[SourcePiece], ...]:
        try:
            return cut_into_slabs(pieces, nbytes)
        except ValueError as error:
            raise VerificationError(f"tensor {name!r} of the source: {error}", where=self.directory) from None

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

    @cached_property
    def source_entries(self) -> dict[str, tuple[TensorEntry, ...]]:
        """The tensors of the source's weight files, those whose codes are packed as if they were not, by file name."""
        return {name: as_unpacked(header.entries, self.packed) for name, header in self.source_headers.items()}

    @cached_property
    def scales(self) -> frozenset[str]:
        """The tensors of the source that only weights need which the layout holds rounded: scales, and shapes."""
        tensors = {e.name: (e.dtype, e.shape) for entries in self.source_entries.values() for e in entries}
        shapes = shapes_of(self.packed)
        found = find_scaled_tensors(self._quantization, tensors, self.directory, shapes)
        found |= find_stacks(self._quantization, self._stored_shapes, self.directory)
        return frozenset(tensor.scales for tensor in found.values()) | shapes

    @cached_property
    def packed(self) -> dict[str, PackedTensor]:
        """The weights of the source whose codes are packed, by name."""
        if not any(may_be_packed(name) for name in self._stored_shapes):
            return {}
        return find_packed_tensors(self._quantization, self._stored_shapes, self._read_shape, self.directory)

    @cached_property
    def _stored_shapes(self) -> dict[str, Shape]:
        return {e.name: (e.dtype, e.shape) for header in self.source_headers.values() for e in header.entries}

    def _read_shape(self, name: str) -> Bytes:
        entry = self.file.entry(name)
        stated = next(e for header in self.source_headers.values() for e in header.entries if e.name == name)
        if (entry.dtype, entry.shape) != (stated.dtype, stated.shape):
            raise VerificationError(f"tensor {name!r} is not that of the source", where=self.file.path)
        return self.file.read(name)

    @property
    def _quantization(self) -> Any:
        return stated_quantization(read_foreign_object(self.directory / CONFIG_FILE))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source checkpoint."""
        return self.index.fingerprint

    @property
    def companions(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of the files beside the weights that the layout keeps from its source."""
        return list(self.index.document["companions"])

    @property
    def verbatim(self) -> dict[str, bytes]:
        """Contents of the source's files that the layout does not have under their own name."""
        sources = [source for source in self.index.sources if source.kind == "verbatim"]
        return {source.name: self.file.read(source.stored.tensor).tobytes() for source in sources}

    @property
    def weight_files(self) -> tuple[tuple[TensorFile, str], ...]:
        """The files with weights, each with the SHA-256 that the index states."""
        return ((self.file, self.index.file_sha256),)

    @property
    def exact(self) -> bool:
        """Whether all weights are stored as they are in the source."""
        return not self.dense and all(block.exact for block in self.index.blocks)

    @property
    def rounding(self) -> str:
        """How the scales of rounded weights were found."""
        return self.index.rounding

    @cached_property
    def dense(self) -> dict[str, DenseTensor]:
        """The tensors outside the blocks whose weights are rounded, by name."""
        return {tensor.name: tensor for tensor in self.index.dense}

    @cached_property
    def gatherings(self) -> dict[str, Gathering]:
        """How the tensors with rounded weights are made from the source, by name."""
        every = gatherings_of(self.index.blocks, self.index.rounding)
        return {name: gathering for name, gathering in every.items() if not gathering.exact}

    def order(self, block: str) -> Order:
        """The neuron in each slot of a block, int32 `[n]`."""
        return self._orders[block]

    def place(self, name: str) -> TensorPlace:
        """Where a source tensor lies that the layout keeps unchanged.

        Raises:
            InputError: The layout keeps no tensor with this name.
        """
        return TensorPlace(self.file, self.file.entry(name))

    def matrices(self) -> Iterator[SourceMatrix]:
        """The matrices of all blocks."""
        for block in self.index.blocks:
            for part in block.matrices:
                yield SourceMatrix(part.source, part.neuron_axis, block.hidden, part.role == "down")

    def regions_of(self, name: str) -> Iterator[tuple[str, Region]]:
        """The blocks with neurons in a source tensor, and where in it."""
        for slab in self.made_slabs.get(name, ()):
            yield from ((piece.block.id, piece.region) for piece in slab.pieces)

    def check_small_tensors(self) -> tuple[str, ...]:
        """Compare the small tensors with their digests in the index, and return what was checked.

        Raises:
            VerificationError: One of them was changed.
        """
        for name, expected in self.index.digests.items():
            if name not in self.file:
                raise VerificationError(f"tensor {name!r} is missing", where=self.file.path)
            if hashlib.sha256(self.file.read(name).data).hexdigest() != expected:
                raise VerificationError(f"tensor {name!r} does not match its digest in the index", where=self.file.path)
        return ("alignment", "digests of small tensors")

    @property
    def ordering_sequences(self) -> Bytes:
        """Digests of the sequences that made the order: uint8 `[k, 16]`."""
        return self.file.read(ORDERING_SEQUENCES).reshape(-1, DIGEST_BYTES)

    def _check_ranges(self) -> None:
        seen = self.file.entry(ORDERING_SEQUENCES)
        if (seen.dtype, seen.shape[1:]) != ("U8", (DIGEST_BYTES,)):
            raise VerificationError(f"{ORDERING_SEQUENCES} is not a list of digests", where=self.file.path)
        index, file = self.index, self.file
        if file.size != index.file_bytes:
            raise VerificationError(f"has {file.size:,} bytes, the index says {index.file_bytes:,}", where=file.path)
        for block in index.blocks:
            self._check_block(block)
            for place in (block.bundles, block.order, block.frequency, *(r.place for r in block.resident)):
                self._check_range(place)
        for tensor in index.dense:
            self._check_range(tensor.place)
            self._check_dense(tensor)
        for source in index.sources:
            self._check_range(source.stored)
            if source.kind == "verbatim" and source.stored.bytes != source.bytes:
                raise VerificationError(f"{source.name} is not stored whole", where=self.directory)

    def _check_range(self, place: TensorRange) -> None:
        entry = self.file.entry(place.tensor)
        start = self.file.header.offset_of(entry)
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
        rows = {kept.weights for kept in block.resident if kept.kind == "rows"}
        stored: tuple[BundlePart | ResidentTensor, ...] = (*block.parts, *block.resident)
        if any(part.weights == MXFP4.name and part.neuron_axis != 0 for part in stored):
            raise VerificationError(f"{block.id} has columns as {MXFP4.name}", where=self.directory)
        if any(part.source_lanes > 1 and (part.neuron_axis != 1 or _is_bias(part)) for part in stored):
            raise VerificationError(f"{block.id} has other parts than columns that alternate", where=self.directory)
        for weights in rows | {part.weights for part in block.parts}:
            scaled = weights != SOURCE and block.dtype in SCALED_DTYPES
            require_convertible(weights, block.id, block.hidden, block.dtype, scaled=scaled)
        element_bytes = DTYPE_BITS.get(block.dtype, 0) // 8
        expected = [part_bytes(part.weights, block.hidden, element_bytes) for part in block.parts]
        found = [part.bytes for part in block.parts]
        offsets = [part.offset for part in block.parts]
        sizes = (block.stride, block.bundles.bytes, block.bundles.dtype)
        exact = [place for place, part in zip(offsets, block.parts, strict=True) if part.weights == SOURCE]
        if any(place % element_bytes or block.stride % element_bytes for place in exact if element_bytes):
            raise VerificationError(f"parts of {block.id} do not lie on whole elements", where=self.directory)
        if (
            found != expected
            or offsets != [0, *itertools.accumulate(expected)][:-1]
            or sizes != (sum(expected), block.neurons * block.stride, block.bundle_dtype)
        ):
            raise VerificationError(f"stride and parts of {block.id} do not fit its bundles", where=self.directory)
        for place, dtype in ((block.order, "I32"), (block.frequency, "F32")):
            self._check_place(place, dtype, (block.neurons,))
        if block.pinned > block.neurons:
            raise VerificationError(f"{block.id} has more pinned slots than neurons", where=self.directory)
        for resident in block.resident:
            if resident.kind == "output_bias":
                self._check_output_bias(block, resident)
            elif resident.kind == "bias":
                self._check_place(resident.place, resident.place.dtype, (block.neurons,))
            elif resident.weights == SOURCE:
                self._check_place(resident.place, block.dtype, (block.neurons, block.hidden))
            else:
                row = part_bytes(resident.weights, block.hidden, element_bytes)
                self._check_place(resident.place, "U8", (block.neurons, row))

    def _check_output_bias(self, block: FlashBlock, bias: ResidentTensor) -> None:
        """Check a source tensor: the block's own, or one for all experts of its layer."""
        place = bias.place
        if place.tensor != bias.source:
            raise VerificationError(
                f"{block.id} uses {place.tensor!r} instead of {bias.source!r}", where=self.directory
            )
        stack = place.shape[:-1] if block.expert is not None else ()
        self._check_place(place, place.dtype, (*stack, block.hidden))
        size = DTYPE_BITS.get(place.dtype, 0) // 8
        index = (block.expert or 0) if stack else 0
        if (bias.source_start, bias.source_pitch) != (index * block.hidden * size, size) or index >= (
            stack[0] if stack else 1
        ):
            raise VerificationError(f"{block.id} uses the wrong part of {place.tensor!r}", where=self.directory)

    def _check_place(self, place: TensorRange, dtype: str, shape: tuple[int, ...]) -> None:
        if (place.dtype, place.shape) != (dtype, shape):
            raise VerificationError(
                f"tensor {place.tensor!r} is {place.dtype} {list(place.shape)}, not {dtype} {list(shape)}",
                where=self.directory,
            )

    def _check_dense(self, tensor: DenseTensor) -> None:
        if tensor.weights not in ROUNDING_FORMATS:
            raise VerificationError(f"tensor {tensor.name!r} is stored as {tensor.weights}", where=self.directory)
        scaled = tensor.dtype in SCALED_DTYPES
        require_convertible(tensor.weights, tensor.name, tensor.columns, tensor.dtype, scaled=scaled)
        self._check_place(tensor.place, "U8", (*tensor.place.shape[:1], tensor.row_bytes))

    def _check_sources(self) -> None:
        """Check that every tensor of the source is there, unchanged or in a form to rebuild it from."""
        stated = {entry.name: entry for entries in self.source_entries.values() for entry in entries}
        kept_names = stated.keys() - self.made_slabs.keys()
        for tensor in self.index.dense:
            if tensor.name not in kept_names or self.dense[tensor.name] is not tensor:
                raise VerificationError(
                    f"tensor {tensor.name!r} is not a dense tensor of the source", where=self.file.path
                )
        for name in sorted(kept_names):
            kept = self.file.entry(name)
            found = (kept.dtype, kept.shape)
            if name in self.dense:
                found = (self.dense[name].dtype, (self.dense[name].rows, self.dense[name].columns))
            if found != (stated[name].dtype, stated[name].shape):
                raise VerificationError(
                    f"tensor {name!r} is {found[0]} {list(found[1])}, "
                    f"but {stated[name].dtype} {list(stated[name].shape)} in the source",
                    where=self.file.path,
                )

    def _read_order(self, block: FlashBlock) -> Order:
        data = self.file.read(block.order.tensor)
        order = data.view("<i4") if block.order.dtype == "I32" and data.size % 4 == 0 else np.zeros(0, dtype=np.int32)
        if not is_permutation(order, block.neurons):
            raise VerificationError(f"{block.order.tensor} is not a permutation", where=self.file.path)
        return order


def _is_bias(part: BundlePart | ResidentTensor) -> bool:
    return isinstance(part, ResidentTensor) and part.kind != "rows"
