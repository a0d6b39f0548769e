"""What a layout will hold and where: the records that planning makes, writers follow, and indexes keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from neuralink_cli.architectures.blocks import FFNBlock, UpValues
from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.companions import LeftOut
from neuralink_cli.files.header import DTYPE_BITS, Header
from neuralink_cli.layout.names import BUNDLED
from neuralink_cli.weight_formats.formats import (
    BLOCK_FORMATS,
    DENSE_BESIDE_ROUNDED,
    NEAREST,
    SOURCE,
    parse_dense_format,
    parse_weight_formats,
)


@dataclass(frozen=True, slots=True)
class TensorRange:
    """A tensor of the flash file; `offset` is absolute in the file, in bytes."""

    tensor: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix of a block, in tensor `tensor` of the source: neurons run along `neuron_axis` of it."""

    tensor: str
    neuron_axis: int
    hidden: int
    is_down: bool


@dataclass(frozen=True, slots=True)
class BundlePart:
    """A stretch of every bundle: `bytes` bytes at `offset`, from a row or column of a matrix in tensor `source`.

    The matrix starts at byte `source_start` of the tensor, its lines are `source_pitch` bytes apart. `weights` is the
    format that they are rounded to, `source` if they are as in the source. Of columns that alternate with those of
    other parts, `source_lane` and `source_lanes` are as in `Region`.
    """

    role: str
    source: str
    neuron_axis: int
    offset: int
    bytes: int
    source_start: int
    source_pitch: int
    weights: str = SOURCE
    source_lane: int = 0
    source_lanes: int = 1


@dataclass(frozen=True, slots=True)
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
    source_lane: int = 0
    source_lanes: int = 1


@dataclass(frozen=True, slots=True)
class FlashBlock:
    """One FFN block of a bundled layout: bundle k of `bundles` is that of neuron `order[k]`, `stride` bytes long.

    `expert` is its number among the experts of its layer; None if it runs on every token. Slots 0 to `pinned` - 1 hold
    the neurons to keep in DRAM; `collapse_gap` is the longest gap of slots worth reading across on the
    device that the order was made for. `dtype` is that of the source's weights. `up_values` is None if the values of up
    are multiplied as they are.
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
    up_values: UpValues | None = None

    @property
    def matrices(self) -> tuple[BundlePart | ResidentTensor, ...]:
        """What holds its weights, biases aside."""
        return (*self.parts, *(kept for kept in self.resident if kept.kind == "rows"))

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
        lanes = (part.source_lane, part.source_lanes)
        lines, line = (self.neurons, width) if part.neuron_axis == 0 else (width, self.neurons * part.source_lanes)
        return Region(part.source, part.neuron_axis, part.source_start, part.source_pitch, lines, line * size, *lanes)


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """What rebuilds a stretch of a source tensor: a resident tensor, or the bytes at `offset` of a block's bundles.

    `region` is where it lies in the source tensor.
    """

    block: FlashBlock
    part: BundlePart | ResidentTensor
    region: Region = field(init=False)

    def __post_init__(self) -> None:
        # Once, as it is asked for again and again.
        object.__setattr__(self, "region", self.block.source_region(self.part))

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


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A matrix of the source that is part of no block, with its rows stored in a weight format.

    Attributes:
        place: The tensor of the layout, U8 `[rows, row_bytes]`, under its name in the source.
        dtype: Its dtype in the source, where it is `[rows, columns]`.
        weights: The format.
    """

    place: TensorRange
    columns: int
    dtype: str
    weights: str

    @property
    def name(self) -> str:
        """Its name, in the layout and in the source."""
        return self.place.tensor

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.place.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the layout."""
        return BLOCK_FORMATS[self.weights].row_bytes(self.columns)

    @property
    def source_row_bytes(self) -> int:
        """Bytes of a row in the source."""
        return self.columns * DTYPE_BITS[self.dtype] // 8


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
    dense: tuple[DenseTensor, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all weights are stored as they are in the source."""
        return not self.dense and all(block.exact for block in self.blocks)

    @property
    def file_bytes(self) -> int:
        """Size of the flash file."""
        return self.header.file_bytes


@dataclass(frozen=True)
class RelayoutOptions:
    """Options of the layout; `alignment` is in bytes, a power of two.

    Attributes:
        all_files: Also copy what is otherwise left out: other copies of the weights, hidden files and the like.
        weights: The format to round FFN weights to, `FORMAT` or `ROLE=FORMAT,...` as in `parse_weight_formats`.
        rounding: How the scales of rounded weights are found: `nearest` or `search`.
        dense_weights: The format to round the matrices outside the blocks to; by default that of
            `DENSE_BESIDE_ROUNDED` if `weights` rounds any, else as in the source.
    """

    layout: str = BUNDLED
    resident: str = "none"
    alignment: int = 4096
    all_files: bool = False
    weights: str = SOURCE
    rounding: str = NEAREST
    dense_weights: str | None = None

    @property
    def dense_format(self) -> str:
        """The format of the matrices outside the blocks.

        Raises:
            OptionError: `weights` or `dense_weights` is no format.
        """
        rounded = any(name != SOURCE for name in self.formats.values())
        if self.dense_weights is None:
            return DENSE_BESIDE_ROUNDED if rounded else SOURCE
        return parse_dense_format(self.dense_weights, "--dense-weights")

    @property
    def formats(self) -> dict[str, str]:
        """The format of every role.

        Raises:
            OptionError: `weights` is no format, nor a list of them.
        """
        return parse_weight_formats(self.weights, "--weights")


@dataclass(frozen=True)
class RelayoutPlan:
    """What will be written: `bundled` is the plan of the flash file, None for a permuted layout.

    Attributes:
        companions: The files copied beside the weights, by their name in the source.
        left_out: The files of the source that are not in the layout.
        own_bytes: Roughly the size of what the layout says of itself: the index, and in a permuted one its placement.
        held_bytes: The most bytes that are in memory as a whole while it is written, as `held_while_writing`.
    """

    source: Path
    options: RelayoutOptions
    blocks: tuple[FFNBlock, ...]
    bundled: BundledPlan | None
    weight_bytes: int
    companions: tuple[str, ...]
    companion_bytes: int
    left_out: tuple[LeftOut, ...]
    own_bytes: int
    held_bytes: int

    @property
    def total_bytes(self) -> int:
        """Size of the weights and the files copied beside them."""
        return self.weight_bytes + self.companion_bytes
