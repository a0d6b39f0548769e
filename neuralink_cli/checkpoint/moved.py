"""Which stretches of a checkpoint's tensors a permutation of neurons changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neuralink_cli.checkpoint.blocks import FFNBlock, biases_by_neuron
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.regions import Region


@dataclass(frozen=True)
class MovedPiece:
    """The weights, or the bias, of the neurons of a block."""

    block: str
    region: Region


def moved_pieces(checkpoint: Checkpoint, blocks: Sequence[FFNBlock]) -> dict[str, list[MovedPiece]]:
    """All that a permutation moves, by tensor."""
    moved: dict[str, list[MovedPiece]] = {}
    for block in blocks:
        for region in moved_regions(checkpoint, block):
            moved.setdefault(region.tensor, []).append(MovedPiece(block.id, region))
    return moved


def moved_regions(checkpoint: Checkpoint, block: FFNBlock) -> Iterator[Region]:
    """All that a permutation of a block's neurons moves."""
    yield from (block.region(part) for part in block.parts)
    for part in biases_by_neuron(block):
        assert part.bias is not None
        yield block.bias_region(part, checkpoint.place(part.bias).entry.dtype)
