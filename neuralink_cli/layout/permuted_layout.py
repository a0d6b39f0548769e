"""Opens a permuted layout: checks its index, files and placement, and rebuilds its source tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

from neuralink_cli.architectures.blocks import MovedPiece
from neuralink_cli.architectures.regions import Region, Slab, cut_into_slabs
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint, TensorPlace
from neuralink_cli.checkpoint.file_names import PERMUTED_INDEX, SHARD_INDEX
from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.files.header import DTYPE_BITS, Header, TensorEntry
from neuralink_cli.files.input_file import read_input
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.gathering import Gathering
from neuralink_cli.layout.index import read_permuted_index
from neuralink_cli.layout.names import MODEL_CARD, ORIGINALS
from neuralink_cli.layout.plan import DenseTensor, SourceMatrix, SourcePiece
from neuralink_cli.layout.replaced import Unreplaced
from neuralink_cli.placement.placement import Placement
from neuralink_cli.weight_formats.formats import NEAREST


class PermutedLayout:
    """Reads a permuted layout. Use as a context manager.

    Attributes:
        kind: Tells the kinds of layout apart.
        unreplaced: Watches that the directory stays the one that was opened.
        loadable: Whether transformers can load it as it is.
        made_slabs: The source tensors held in another form: none, as it only moves neurons.

    Raises:
        InputError: Index, weights or placement are missing or malformed.
        VerificationError: They do not fit each other.
    """

    kind: Literal["permuted"] = "permuted"
    exact = True
    gatherings: Mapping[str, Gathering] = MappingProxyType({})
    dense: Mapping[str, DenseTensor] = MappingProxyType({})
    rounding = NEAREST
    loadable = True
    made_slabs: Mapping[str, tuple[Slab[SourcePiece], ...]] = MappingProxyType({})

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.unreplaced = Unreplaced(directory)
        self.index = read_permuted_index(directory)
        self._stack = ExitStack()
        try:
            self.checkpoint = self._stack.enter_context(Checkpoint(directory))
            self.placement = self._stack.enter_context(Placement(directory / self.index["placement"]))
            self._check()
        except (InputError, VerificationError):
            self._stack.close()
            raise

    def __enter__(self) -> PermutedLayout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source checkpoint."""
        return str(self.index["model"]["fingerprint"])

    @property
    def weight_files(self) -> tuple[tuple[TensorFile, str], ...]:
        """The files with weights, each with the SHA-256 that the index states."""
        stated = {file["name"]: file["sha256"] for file in self.index["files"]}
        return tuple((file, stated[file.path.name]) for file in self.checkpoint.files)

    @property
    def companions(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of the files beside the weights that the layout keeps from its source."""
        return list(self.index["companions"])

    @property
    def source_headers(self) -> dict[str, Header]:
        """The headers of the source's weight files, which a permutation does not change, by file name."""
        return {file.path.name: file.header for file in self.checkpoint.files}

    @property
    def source_entries(self) -> dict[str, tuple[TensorEntry, ...]]:
        """The tensors of the source's weight files, by file name."""
        return {name: header.entries for name, header in self.source_headers.items()}

    @property
    def verbatim(self) -> dict[str, bytes]:
        """Contents of the source's model card, and of its shard index, which the layout shares."""
        cards = [MODEL_CARD] if MODEL_CARD in self.index["verbatim"] else []
        kept = {name: read_input(self.directory / ORIGINALS / name) for name in cards}
        if self.checkpoint.sharded:
            kept[SHARD_INDEX] = self.checkpoint.read_beside(SHARD_INDEX)
        return kept

    @cached_property
    def moved_slabs(self) -> dict[str, tuple[Slab[MovedPiece], ...]]:
        """The permuted tensors by name, in stretches made of whole pieces.

        Raises:
            VerificationError: The index does not describe them whole.
        """
        pieces: dict[str, list[MovedPiece]] = {}
        for block in self.index["blocks"]:
            for region in block["regions"]:
                pieces.setdefault(region["tensor"], []).append(MovedPiece(block["id"], Region(**region)))
        sizes = {name: self.checkpoint.place(name).entry.nbytes for name in pieces}
        try:
            return {(last := name): cut_into_slabs(found, sizes[name]) for name, found in pieces.items()}
        except ValueError as error:
            raise VerificationError(f"tensor {last!r}: {error}", where=self.directory / PERMUTED_INDEX) from None

    def order(self, block: str) -> Order:
        """The neuron in each slot of a block, int32 `[n]`."""
        return self.placement.blocks[block].order

    def place(self, name: str) -> TensorPlace:
        """Where the tensor with this name in the source lies.

        Raises:
            InputError: There is no such tensor.
        """
        return self.checkpoint.place(name)

    def matrices(self) -> Iterator[SourceMatrix]:
        """The matrices of all blocks. The last of a block is down; biases are no matrices."""
        for block in self.index["blocks"]:
            regions = [Region(**region) for region in block["regions"]]
            found = [region for region in regions if self._is_matrix(region)]
            for number, region in enumerate(found, 1):
                yield SourceMatrix(region.tensor, region.neuron_axis, self._hidden(region), number == len(found))

    def _is_matrix(self, region: Region) -> bool:
        """Whether a region is one of weights. Of a model one wide, they have a number per neuron, as biases do."""
        hidden = self._hidden(region)
        shape = self.checkpoint.place(region.tensor).entry.shape
        return hidden > 1 or (len(shape) > 1 and shape[-2:][1 - region.neuron_axis] == 1)

    def _hidden(self, region: Region) -> int:
        """How many weights a neuron has in a region."""
        dtype = self.checkpoint.place(region.tensor).entry.dtype
        return region.line_bytes * 8 // DTYPE_BITS[dtype] if region.neuron_axis == 0 else region.lines

    def regions_of(self, name: str) -> Iterator[tuple[str, Region]]:
        """The blocks with neurons in a source tensor, and where in it."""
        for slab in self.moved_slabs.get(name, ()):
            yield from ((piece.block, piece.region) for piece in slab.pieces)

    @property
    def ordering_sequences(self) -> Bytes:
        """Digests of the sequences that made the order: uint8 `[k, 16]`."""
        return self.placement.ordering_sequences

    def check_small_tensors(self) -> tuple[str, ...]:
        """Check nothing: small tensors lie in files whose digests are checked whole."""
        return ()

    def _check(self) -> None:
        where = self.directory / PERMUTED_INDEX
        sizes = {file["name"]: file["bytes"] for file in self.index["files"]}
        found = {file.path.name: file.size for file in self.checkpoint.files}
        if sizes != found:
            raise VerificationError(f"weight files are {found}, the index says {sizes}", where=where)
        if self.placement.content_sha256 != self.index["provenance"].get("placement_sha256"):
            raise VerificationError("the placement beside it is not the one the layout was made with", where=where)
        for name in self.index["verbatim"]:
            if not (self.directory / ORIGINALS / name).is_file():
                raise InputError("is missing", where=self.directory / ORIGINALS / name)
        for block in self.index["blocks"]:
            if block["id"] not in self.placement.blocks:
                raise VerificationError(f"block {block['id']} is not in the placement", where=where)
            neurons = self.placement.blocks[block["id"]].order.size
            if block["neurons"] != neurons:
                raise VerificationError(
                    f"{block['id']} has {neurons} neurons, but {block['neurons']} in the index", where=where
                )
            for region in block["regions"]:
                entry = self.checkpoint.place(region["tensor"]).entry
                lanes = region.get("lanes", 1)
                found = region["lines"] * 8 if region["neuron_axis"] == 0 else 8 * region["line_bytes"]
                size = DTYPE_BITS[entry.dtype] if region["neuron_axis"] else 8
                whole = not any(region[key] * 8 % DTYPE_BITS[entry.dtype] for key in ("start", "pitch", "line_bytes"))
                whole = whole and (lanes == 1 or region["neuron_axis"] == 1)
                if found != neurons * size * lanes or DTYPE_BITS[entry.dtype] % 8 or not whole:
                    raise VerificationError(
                        f"tensor {entry.name!r} {entry.dtype} {list(entry.shape)} does not fit {block['id']}",
                        where=where,
                    )
        # Computed only to check that the index describes every permuted tensor whole.
        _ = self.moved_slabs
