"""Writes an ordinary HuggingFace checkpoint, shard by shard, in which only the order of the neurons differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.moved import MovedPiece
from neuralink_cli.checkpoint.regions import cut_into_slabs
from neuralink_cli.flash.bundled_writer import tensor_section
from neuralink_cli.flash.journal import Journal
from neuralink_cli.flash.moving import moved_section
from neuralink_cli.flash.pipeline import Scratch
from neuralink_cli.flash.sections import ready, write_sections
from neuralink_cli.placement.placement import PlacedBlock, inverse


def write_permuted(
    directory: Path,
    checkpoint: Checkpoint,
    moved: Mapping[str, Sequence[MovedPiece]],
    placed: Mapping[str, PlacedBlock],
    progress: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> dict[str, str]:
    """Write every weight file into `directory`, with the header bytes it had, and return their SHA-256 by name.

    Args:
        moved: As `moved_pieces` gives it.
    """
    scratch = Scratch()
    digests = {}
    for file in checkpoint.files:
        sections = [ready(file.header.prelude)]
        for entry in file.header.entries:
            if entry.name in moved:
                slabs = cut_into_slabs(moved[entry.name], entry.nbytes)
                sections.append(moved_section(file, entry, slabs, lambda block: inverse(placed[block].order), scratch))
            else:
                sections.append(tensor_section(checkpoint, entry.name))
        digests[file.path.name] = write_sections(directory / file.path.name, sections, progress, journal)
    return digests
