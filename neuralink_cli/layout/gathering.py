"""How the tensors of a bundled layout are made from lines of the source: the same for writing and for verifying.

A tensor has one stretch of bytes for every slot, and every part of a stretch comes from a region of the source: moved
as it is, or rounded to a weight format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neuralink_cli.architectures.regions import Region, stretches, taken_apart
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import DTYPE_BITS
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.pipeline import FileRange
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, BLOCK_WEIGHTS, MXFP4, SOURCE


@dataclass(frozen=True, slots=True)
class GatheredPart:
    """A part of every stretch: the weights in `region` of the source, at byte `offset`, in the format `weights`."""

    region: Region
    offset: int
    weights: str


@dataclass(frozen=True, slots=True)
class Gathering:
    """A tensor that is made of parts.

    Attributes:
        block: Id of its block.
        nbytes: Size of the tensor.
        stride: Bytes of a stretch.
        dtype: Dtype of the source's weights.
        rounding: How the scales of rounded parts are found.
    """

    block: str
    nbytes: int
    stride: int
    dtype: str
    parts: tuple[GatheredPart, ...]
    rounding: str

    @property
    def exact(self) -> bool:
        """Whether no part is rounded."""
        return all(part.weights == SOURCE for part in self.parts)

    def reads(self, checkpoint: Checkpoint) -> tuple[FileRange, ...]:
        """What `fill` needs of the source, in this order."""
        return tuple(_lines_of(checkpoint, part.region.some_lines(first, count)) for part, first, count in self._cuts())

    def passing_bytes(self, checkpoint: Checkpoint) -> int:
        """The most bytes that `fill` has in memory for a while, beside the tensor and what it reads."""
        scales = sum(
            checkpoint.scale_bytes(part.region.tensor, part.region.lines * part.region.pitch)
            for part in self.parts
            if part.weights != SOURCE
        )
        passing = 0
        for part, _, count in self._cuts():
            lines, widened = count * part.region.pitch, 0
            if part.weights not in (SOURCE, MXFP4.name) and part.region.tensor in checkpoint.scaled:
                # A code takes a byte here, packed or not, and its value is float32.
                lines = widened = 4 * lines
            # What alternates with other parts is copied, after it was widened.
            passing = max(passing, widened + (lines // part.region.lanes if part.region.lanes > 1 else 0))
        return scales + passing

    def fill(self, pieces: Iterator[Bytes], slots: Order, made: Bytes, checkpoint: Checkpoint) -> None:
        """Make the tensor.

        Args:
            pieces: The bytes of `reads`.
            slots: int32 `[n]`, the slot of every neuron.
            made: uint8 `[nbytes]`, receives the tensor.
            checkpoint: The source, which has the scales of weights that need some.

        Raises:
            UnsupportedError: Weights that cannot be rounded: not finite, or too large for the scale of the format.
        """
        # Imported here because numba is slow to import and a quick look at a layout does not need it.
        from neuralink_cli.layout.bundling import gather_part
        from neuralink_cli.weight_formats.quantising import gather_quantised
        from neuralink_cli.weight_formats.scaled import carry_quantised, read_scales, widen_scaled

        element_bytes = DTYPE_BITS[self.dtype] // 8
        scales = {
            part: read_scales(checkpoint, part.region.tensor, part.region)
            for part in self.parts
            if part.weights != SOURCE
        }
        for part, first, count in self._cuts():
            some, lines = part.region.some_lines(first, count), next(pieces)
            if part.weights == SOURCE:
                gather_part(lines, some, first, slots, element_bytes, made, self.stride, part.offset)
                continue
            kind, dtype = BLOCK_FORMATS[part.weights], self.dtype
            own_scales = scales[part]
            if kind is MXFP4:
                if own_scales is None or own_scales.exponents is None:
                    raise UnsupportedError(f"is not MXFP4, which {self.block} has it as", where=part.region.tensor)
                bad = carry_quantised(lines, some, first, slots, own_scales, made, self.stride, part.offset)
                if bad is not None:
                    raise bad.error(f"{part.region.tensor} ({self.block})", kind)
                continue
            if own_scales is not None:
                lines, some = widen_scaled(lines, some, own_scales)
                dtype = "F32"
            if some.lanes > 1:
                lines, some = taken_apart(lines, some, DTYPE_BITS[dtype] // 8)
            bad = gather_quantised(
                lines, some, first, slots, dtype, kind, made, self.stride, part.offset, rounding=self.rounding
            )
            if bad is not None:
                raise bad.error(f"{part.region.tensor} ({self.block})", kind)

    def _cuts(self) -> Iterator[tuple[GatheredPart, int, int]]:
        """Each part in stretches of lines; a block of rounded weights lies in one stretch."""
        for part in self.parts:
            whole = BLOCK_WEIGHTS if part.weights != SOURCE and part.region.neuron_axis == 1 else 1
            for first, count in stretches(part.region.lines, part.region.pitch, pipeline.PIECE, whole):
                yield part, first, count


def gatherings_of(blocks: Sequence[FlashBlock], rounding: str) -> dict[str, Gathering]:
    """What is gathered from the source for some blocks, by the name of the tensor."""
    found = {}
    for block in blocks:
        parts = tuple(GatheredPart(block.source_region(part), part.offset, part.weights) for part in block.parts)
        bundles = block.bundles
        found[bundles.tensor] = Gathering(block.id, bundles.bytes, block.stride, block.dtype, parts, rounding)
        for kept in block.resident:
            if kept.kind == "output_bias":
                continue
            dtype = block.dtype if kept.kind == "rows" else kept.place.dtype
            rows = (GatheredPart(block.source_region(kept), 0, kept.weights),)
            stride = kept.place.bytes // block.neurons
            found[kept.place.tensor] = Gathering(block.id, kept.place.bytes, stride, dtype, rows, rounding)
    return found


def _lines_of(checkpoint: Checkpoint, region: Region) -> FileRange:
    return checkpoint.place(region.tensor).stretch(region.start, region.stop)
