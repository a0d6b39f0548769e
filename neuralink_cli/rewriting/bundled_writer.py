"""Streams a planned bundled layout into its file, one tensor after the other, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.layout.dense_rounding import rounded_section
from neuralink_cli.layout.gathering import Gathering, gatherings_of
from neuralink_cli.layout.plan import BundledPlan, SourceFile
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, PlacedBlock, inverse
from neuralink_cli.streaming.journal import Journal
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import Scratch
from neuralink_cli.streaming.sections import Section, copied, ready, write_sections, zeros


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
    for name, gathering in gatherings_of(plan.blocks, plan.rounding).items():
        made[name] = _gathered(gathering, checkpoint, placed[gathering.block].order, scratch)
    for block in plan.blocks:
        made[block.order.tensor] = ready(placed[block.id].order)
        made[block.frequency.tensor] = ready(placed[block.id].frequency)
    for tensor in plan.dense:
        made[tensor.name] = rounded_section(tensor, checkpoint, plan.rounding, scratch)
    for source in plan.sources:
        made[source.stored.tensor] = ready(_stored_bytes(source, checkpoint))
    return made


def _gathered(gathering: Gathering, checkpoint: Checkpoint, order: Order, scratch: Scratch) -> Section:
    """A section with one stretch per neuron, in the order of the slots."""

    def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
        gathered = scratch.take(gathering.nbytes)
        gathering.fill(pieces, inverse(order), gathered, checkpoint)
        output.write(gathered)

    return Section(gathering.nbytes, gathering.reads(checkpoint), write)


def _stored_bytes(source: SourceFile, checkpoint: Checkpoint) -> bytes:
    if source.kind == "verbatim":
        return checkpoint.read_beside(source.name)
    return next(file.header.prelude for file in checkpoint.files if file.path.name == source.name)
