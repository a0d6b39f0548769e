"""Streams a planned bundled layout into its file, one tensor after the other, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from neuralink_cli.architectures.regions import Region, stretches
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files import pipeline
from neuralink_cli.files.header import DTYPE_BITS
from neuralink_cli.files.journal import Journal
from neuralink_cli.files.output_file import OutputFile
from neuralink_cli.files.pipeline import FileRange, Scratch
from neuralink_cli.files.sections import Section, copied, ready, write_sections, zeros
from neuralink_cli.layout.bundling import gather_part
from neuralink_cli.layout.plan import BundledPlan, SourceFile
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, PlacedBlock, inverse


def write_bundled(
    path: Path,
    plan: BundledPlan,
    checkpoint: Checkpoint,
    placed: Mapping[str, PlacedBlock],
    ordering_sequences: Bytes,
    progress: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> str:
    """Write the flash file at `path`, or the rest of it if `journal` knows of a part, and return its SHA-256."""
    made = _made_sections(plan, checkpoint, placed) | {ORDERING_SEQUENCES: ready(ordering_sequences)}
    sections = [ready(plan.header.prelude)]
    for entry in plan.header.entries:
        if entry.name in made:
            sections.append(made[entry.name])
        elif entry.name in checkpoint:
            sections.append(tensor_section(checkpoint, entry.name))
        else:
            sections.append(zeros(entry.nbytes))
    return write_sections(path, sections, progress, journal)


def tensor_section(checkpoint: Checkpoint, name: str) -> Section:
    """A section with a tensor of the checkpoint, unchanged."""
    place = checkpoint.place(name)
    return copied(place.file, place.offset, place.offset + place.entry.nbytes)


def _made_sections(plan: BundledPlan, checkpoint: Checkpoint, placed: Mapping[str, PlacedBlock]) -> dict[str, Section]:
    """The tensors that are not simply copied, by name."""
    made: dict[str, Section] = {}
    scratch = Scratch()
    for block in plan.blocks:
        order, frequency = placed[block.id].order, placed[block.id].frequency
        parts = [(block.source_region(part), part.offset) for part in block.parts]
        made[block.bundles.tensor] = _gathered(block.bundles.bytes, block.dtype, parts, checkpoint, order, scratch)
        made[block.order.tensor] = ready(order)
        made[block.frequency.tensor] = ready(frequency)
        for kept in block.resident:
            if kept.kind != "output_bias":
                rows = [(block.source_region(kept), 0)]
                made[kept.place.tensor] = _gathered(
                    kept.place.bytes, kept.place.dtype, rows, checkpoint, order, scratch
                )
    for source in plan.sources:
        made[source.stored.tensor] = ready(_stored_bytes(source, checkpoint))
    return made


def _gathered(
    nbytes: int,
    dtype: str,
    parts: list[tuple[Region, int]],
    checkpoint: Checkpoint,
    order: Order,
    scratch: Scratch,
) -> Section:
    """A section with one stretch per neuron, in the order of the slots, gathered from regions of tensors.

    Args:
        parts: Where the weights lie in the source, and at which byte of a stretch to put them.
    """
    stride, element_bytes = nbytes // order.size, DTYPE_BITS[dtype] // 8
    cuts = [
        (region, offset, first, count)
        for region, offset in parts
        for first, count in stretches(region.lines, region.pitch, pipeline.PIECE)
    ]

    def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
        slots = inverse(order)
        gathered = scratch.take(nbytes)
        for region, offset, first, count in cuts:
            some = region.some_lines(first, count)
            gather_part(next(pieces), some, first, slots, element_bytes, gathered, stride, offset)
        output.write(gathered)

    reads = tuple(_lines_of(checkpoint, region.some_lines(first, count)) for region, _, first, count in cuts)
    return Section(nbytes, reads, write)


def _lines_of(checkpoint: Checkpoint, region: Region) -> FileRange:
    place = checkpoint.place(region.tensor)
    return FileRange(place.file, place.offset + region.start, region.stop - region.start)


def _stored_bytes(source: SourceFile, checkpoint: Checkpoint) -> bytes:
    if source.kind == "verbatim":
        return checkpoint.read_beside(source.name)
    return next(file.header.prelude for file in checkpoint.files if file.path.name == source.name)
