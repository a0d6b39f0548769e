"""What a bundled layout will hold and where, decided completely before the first byte is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from neuralink_cli.architectures.blocks import BlockPart, FFNBlock, biases_by_neuron, moved_pieces
from neuralink_cli.architectures.regions import Region
from neuralink_cli.calibration.digests import DIGEST_BYTES
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import SHARD_INDEX
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import DTYPE_BITS, Header, TensorEntry, build_header, tensor_bytes
from neuralink_cli.files.weight_formats import AS_IN_SOURCE, NEAREST, SOURCE, part_bytes, require_convertible
from neuralink_cli.layout.names import MODEL_CARD
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, PlacementBlock

# Bytes of an element of the widest dtype.
_WIDEST = 8

TensorSpec = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorRange:
    """A tensor of the flash file; `offset` is absolute in the file, in bytes."""

    tensor: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BundlePart:
    """A stretch of every bundle: `bytes` bytes at `offset`, from a row or column of a matrix in tensor `source`.

    The matrix starts at byte `source_start` of the tensor, its lines are `source_pitch` bytes apart. `weights` is the
    format that they are rounded to, `source` if they are as in the source.
    """

    role: str
    source: str
    neuron_axis: int
    offset: int
    bytes: int
    source_start: int
    source_pitch: int
    weights: str = SOURCE


@dataclass(frozen=True)
class ResidentTensor:
    """FFN weights kept out of the bundles, for DRAM.

    `kind` is "rows" (dense `[n, hidden]`, by slot), "bias" (`[n]`, by slot) or "output_bias" (a tensor of the
    source as it was, `[hidden]` from `source_start` on). The source is described as in `BundlePart`.
    """

    role: str
    kind: str
    source: str
    neuron_axis: int
    place: TensorRange
    source_start: int
    source_pitch: int
    weights: str = SOURCE


@dataclass(frozen=True)
class FlashBlock:
    """One FFN block of a bundled layout: bundle k of `bundles` is that of neuron `order[k]`, `stride` bytes long.

    `expert` is its number among the experts of its layer; None if it runs on every token. Slots 0 to `pinned` - 1 hold
    the neurons to keep in DRAM; `collapse_gap` is the longest gap of slots worth reading across on the
    device that the order was made for. `dtype` is that of the source's weights.
    """

    id: str
    expert: int | None
    neurons: int
    hidden: int
    dtype: str
    activation: str
    threshold: float
    pinned: int
    collapse_gap: int
    stride: int
    bundles: TensorRange
    parts: tuple[BundlePart, ...]
    resident: tuple[ResidentTensor, ...]
    order: TensorRange
    frequency: TensorRange

    @property
    def exact(self) -> bool:
        """Whether all its weights are stored as they are in the source."""
        stored: tuple[BundlePart | ResidentTensor, ...] = (*self.parts, *self.resident)
        return all(part.weights == SOURCE for part in stored)

    @property
    def bundle_dtype(self) -> str:
        """The dtype of the tensor of its bundles: bytes, if any part of them is rounded."""
        return self.dtype if all(part.weights == SOURCE for part in self.parts) else "U8"

    def source_region(self, part: BundlePart | ResidentTensor) -> Region:
        """Where a part of the bundles, or a resident tensor, lies in the source."""
        bias = isinstance(part, ResidentTensor) and part.kind != "rows"
        size = DTYPE_BITS[part.place.dtype if isinstance(part, ResidentTensor) and bias else self.dtype] // 8
        width = 1 if isinstance(part, ResidentTensor) and part.kind == "bias" else self.hidden
        lines, line = (self.neurons, width) if part.neuron_axis == 0 else (width, self.neurons)
        return Region(part.source, part.neuron_axis, part.source_start, part.source_pitch, lines, line * size)


@dataclass(frozen=True)
class SourcePiece:
    """What rebuilds a stretch of a source tensor: a resident tensor, or the bytes at `offset` of a block's bundles."""

    block: FlashBlock
    part: BundlePart | ResidentTensor

    @property
    def region(self) -> Region:
        """Where it lies in the source tensor."""
        return self.block.source_region(self.part)

    @property
    def stored(self) -> TensorRange:
        """The tensor of the layout that holds its weights, in an equal stretch for every slot."""
        return self.part.place if isinstance(self.part, ResidentTensor) else self.block.bundles

    @property
    def offset(self) -> int:
        """Where its weights start in a stretch, in bytes."""
        return 0 if isinstance(self.part, ResidentTensor) else self.part.offset

    @property
    def dtype(self) -> str:
        """Its dtype in the source."""
        rows = isinstance(self.part, BundlePart) or self.part.kind == "rows"
        return self.block.dtype if rows else self.stored.dtype


@dataclass(frozen=True)
class SourceFile:
    """A file of the source checkpoint that `restore` rebuilds.

    `kind` is "weights" (stored: the bytes before its data section) or "verbatim" (stored: the whole file).
    """

    name: str
    kind: str
    bytes: int
    stored: TensorRange


@dataclass(frozen=True)
class BundledPlan:
    """The whole flash file: its header, its blocks, and the files it came from."""

    header: Header
    alignment: int
    resident: str
    blocks: tuple[FlashBlock, ...]
    sources: tuple[SourceFile, ...]
    rounding: str = NEAREST

    @property
    def file_bytes(self) -> int:
        """Size of the flash file."""
        return self.header.file_bytes


def plan_bundled(
    checkpoint: Checkpoint,
    blocks: Sequence[FFNBlock],
    placed: Mapping[str, PlacementBlock],
    *,
    device: DeviceModel | None = None,
    ordering_sequences: int = 0,
    resident: str = "none",
    alignment: int = 4096,
    weights: Mapping[str, str] = AS_IN_SOURCE,
    rounding: str = NEAREST,
) -> BundledPlan:
    """Plan the bundled layout of a checkpoint.

    Bundles come first, each tensor on a multiple of `alignment`; where a tensor does not fill its last page, a padding
    tensor follows it. All other tensors follow from a multiple of 8 on, wide dtypes first, so that each is naturally
    aligned.

    Args:
        placed: What the placement says of every block, by id.
        device: What reads of these bundles cost; by default the gap is the placement's, for bundles as it knows them.
        ordering_sequences: How many sequences made the order.
        resident: "none", or "gate" to keep the rows that decide firing out of the bundles.
        weights: The format to store weights in, by role.
        rounding: How the scales of rounded weights are found.

    Raises:
        UnsupportedError: A block whose parts differ in dtype, or cannot be rounded to a format; or a checkpoint that
            uses a tensor name of the layout.
    """
    for block in blocks:
        for part in block.parts:
            require_convertible(weights[part.role], block.id, block.hidden, part.dtype)
    bundled = {block.id: _bundled_parts(checkpoint, block, resident) for block in blocks}
    specs = _bundle_specs(blocks, bundled, alignment, weights)
    seen: TensorSpec = (ORDERING_SEQUENCES, "U8", (ordering_sequences, DIGEST_BYTES))
    rest = [
        seen,
        *_small_specs(checkpoint, blocks, resident, weights),
        *_source_specs(checkpoint),
        *_other_specs(checkpoint, blocks),
    ]
    specs += sorted(rest, key=lambda spec: -DTYPE_BITS[spec[1]])
    try:
        header = build_header(specs, {}, alignment=max(alignment, _WIDEST))
    except ValueError as error:
        raise UnsupportedError(f"cannot be laid out: {error}", where=checkpoint.directory) from None
    ranges = {entry.name: _range(entry, header.data_start) for entry in header.entries}
    return BundledPlan(
        header=header,
        alignment=alignment,
        resident=resident,
        blocks=tuple(
            _flash_block(block, bundled[block.id], placed[block.id], ranges, resident, device, weights)
            for block in blocks
        ),
        sources=_source_files(checkpoint, ranges),
        rounding=rounding,
    )


def verbatim_files(checkpoint: Checkpoint) -> list[str]:
    """Files kept whole inside the layout, because their name would mean something else beside a flash layout."""
    names = [SHARD_INDEX] if checkpoint.sharded else []
    return [*names, MODEL_CARD] if (checkpoint.directory / MODEL_CARD).is_file() else names


def _bundled_parts(checkpoint: Checkpoint, block: FFNBlock, resident: str) -> tuple[BlockPart, ...]:
    if len({part.dtype for part in block.parts}) > 1:
        kinds = ", ".join(f"{part.weight} {part.dtype}" for part in block.parts)
        raise UnsupportedError(
            f"parts of {block.id} differ in dtype ({kinds}), so they cannot form a bundle",
            where=checkpoint.directory,
            fix="convert the checkpoint to one dtype, or use --layout permuted",
        )
    firing = block.firing_part
    return tuple(part for part in block.parts if resident == "none" or part is not firing)


def _bundle_specs(
    blocks: Sequence[FFNBlock],
    bundled: Mapping[str, Sequence[BlockPart]],
    alignment: int,
    weights: Mapping[str, str],
) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    gap = 0
    for block in blocks:
        if gap:
            specs.append((f"padding.{len(specs)}", "U8", (gap,)))
        parts = bundled[block.id]
        dtype, shape = parts[0].dtype, (block.neurons, len(parts) * block.hidden)
        if any(weights[part.role] != SOURCE for part in parts):
            dtype, shape = "U8", (block.neurons, sum(_row_bytes(block, part, weights) for part in parts))
        specs.append((f"{block.id}.bundles", dtype, shape))
        gap = -tensor_bytes(dtype, shape) % alignment
    tail = -sum(tensor_bytes(dtype, shape) for _, dtype, shape in specs) % _WIDEST
    return [*specs, (f"padding.{len(specs)}", "U8", (tail,))] if tail else specs


def _row_bytes(block: FFNBlock, part: BlockPart, weights: Mapping[str, str]) -> int:
    """Bytes of one neuron's weights in a part."""
    return part_bytes(weights[part.role], block.hidden, part.element_bytes)


def _small_specs(
    checkpoint: Checkpoint, blocks: Sequence[FFNBlock], resident: str, weights: Mapping[str, str]
) -> Iterable[TensorSpec]:
    for block in blocks:
        yield f"{block.id}.order", "I32", (block.neurons,)
        yield f"{block.id}.frequency", "F32", (block.neurons,)
        if resident == "gate":
            part = block.firing_part
            dtype, width = part.dtype, block.hidden
            if weights[part.role] != SOURCE:
                dtype, width = "U8", _row_bytes(block, part, weights)
            yield f"{block.id}.{part.role}", dtype, (block.neurons, width)
        for part in biases_by_neuron(block):
            assert part.bias is not None
            yield f"{block.id}.{part.role}.bias", checkpoint.place(part.bias).entry.dtype, (block.neurons,)


def _source_specs(checkpoint: Checkpoint) -> Iterable[TensorSpec]:
    for file in checkpoint.files:
        yield f"source.{file.path.name}", "U8", (file.header.data_start,)
    for name in verbatim_files(checkpoint):
        yield f"source.{name}", "U8", (len(checkpoint.read_beside(name)),)


def _other_specs(checkpoint: Checkpoint, blocks: Sequence[FFNBlock]) -> Iterable[TensorSpec]:
    moved = moved_pieces(checkpoint, blocks)
    for name in sorted(checkpoint.tensors):
        if name not in moved:
            entry = checkpoint.place(name).entry
            yield name, entry.dtype, entry.shape


def _range(entry: TensorEntry, data_start: int) -> TensorRange:
    return TensorRange(entry.name, data_start + entry.start, entry.nbytes, entry.dtype, entry.shape)


def _flash_block(
    block: FFNBlock,
    bundled: Sequence[BlockPart],
    placed: PlacementBlock,
    ranges: Mapping[str, TensorRange],
    resident: str,
    device: DeviceModel | None,
    weights: Mapping[str, str],
) -> FlashBlock:
    sizes = [_row_bytes(block, part, weights) for part in bundled]
    stride = sum(sizes)
    _require_aligned_parts(block, bundled, sizes, weights)
    gap = placed.collapse_gap if device is None else collapse_gap(device.operation_in_bundles(stride))
    parts = tuple(
        BundlePart(
            part.role, part.weight, part.neuron_axis, stop - size, size, *_place(block, part), weights[part.role]
        )
        for part, size, stop in zip(bundled, sizes, itertools.accumulate(sizes), strict=True)
    )
    kept = []
    if resident == "gate":
        firing = block.firing_part
        place = ranges[f"{block.id}.{firing.role}"]
        kept.append(
            ResidentTensor(
                firing.role,
                "rows",
                firing.weight,
                firing.neuron_axis,
                place,
                *_place(block, firing),
                weights[firing.role],
            )
        )
    for part in block.parts:
        if part.bias is not None and part.role == "down":
            place = ranges[part.bias]
            size = DTYPE_BITS[place.dtype] // 8
            kept.append(ResidentTensor("down", "output_bias", part.bias, 0, place, part.bias_start * size, size))
        elif part.bias is not None:
            place = ranges[f"{block.id}.{part.role}.bias"]
            region = block.bias_region(part, place.dtype)
            kept.append(ResidentTensor(part.role, "bias", part.bias, 0, place, region.start, region.pitch))
    return FlashBlock(
        id=block.id,
        expert=None if block.expert is None else block.expert.index,
        neurons=block.neurons,
        hidden=block.hidden,
        dtype=bundled[0].dtype,
        activation=block.activation,
        threshold=placed.threshold,
        pinned=placed.pinned,
        collapse_gap=gap,
        stride=stride,
        bundles=ranges[f"{block.id}.bundles"],
        parts=parts,
        resident=tuple(kept),
        order=ranges[f"{block.id}.order"],
        frequency=ranges[f"{block.id}.frequency"],
    )


def _require_aligned_parts(
    block: FFNBlock, bundled: Sequence[BlockPart], sizes: Sequence[int], weights: Mapping[str, str]
) -> None:
    """Parts as in the source are moved as whole elements, so they must lie on multiples of them in every bundle."""
    for part, size, stop in zip(bundled, sizes, itertools.accumulate(sizes), strict=True):
        if weights[part.role] == SOURCE and ((stop - size) % part.element_bytes or sum(sizes) % part.element_bytes):
            raise UnsupportedError(
                f"the {part.role} weights, left as {part.dtype}, do not lie on whole elements beside rounded parts of "
                f"{block.hidden} weights",
                where=block.id,
                fix="give every role a format in --weights",
            )


def _place(block: FFNBlock, part: BlockPart) -> tuple[int, int]:
    region = block.region(part)
    return region.start, region.pitch


def _source_files(checkpoint: Checkpoint, ranges: Mapping[str, TensorRange]) -> tuple[SourceFile, ...]:
    weights = [
        SourceFile(file.path.name, "weights", file.size, ranges[f"source.{file.path.name}"])
        for file in checkpoint.files
    ]
    verbatim = [
        SourceFile(name, "verbatim", ranges[f"source.{name}"].bytes, ranges[f"source.{name}"])
        for name in verbatim_files(checkpoint)
    ]
    return (*weights, *verbatim)
