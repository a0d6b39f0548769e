"""Writes an ordinary HuggingFace checkpoint, shard by shard, in which only the order of the neurons differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from neuralink_cli.checkpoint.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.regions import cut_into_slabs
from neuralink_cli.flash.bundled_writer import tensor_chunks
from neuralink_cli.flash.bundling import permute_slab
from neuralink_cli.flash.moved import moved_pieces
from neuralink_cli.flash.output_file import OutputFile
from neuralink_cli.placement.placement import PlacedBlock


def write_permuted(
    directory: Path,
    checkpoint: Checkpoint,
    blocks: Sequence[FFNBlock],
    placed: Mapping[str, PlacedBlock],
    progress: Callable[[int], object] | None = None,
) -> dict[str, str]:
    """Write every weight file into `directory`, with the header bytes it had, and return their SHA-256 by name."""
    moved = moved_pieces(checkpoint, blocks)
    digests = {}
    for file in checkpoint.files:
        with OutputFile(directory / file.path.name, progress) as output:
            output.write(file.header.prelude)
            for entry in file.header.entries:
                if entry.name in moved:
                    for slab in cut_into_slabs(moved[entry.name], entry.nbytes):
                        data = file.read(entry.name, slab.start, slab.stop)
                        output.write(permute_slab(data, slab, entry.dtype, lambda block: placed[block].order))
                else:
                    for chunk in tensor_chunks(checkpoint, entry.name):
                        output.write(chunk)
            digests[file.path.name] = output.sha256
    return digests
