"""The FFN blocks of a checkpoint: which tensors hold their neurons, checked against each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files.header import DTYPE_BITS

FIRING_ROLES = ("gate", "up")
_EXPERT_ID = re.compile(r"(.*\.experts)\.[0-9]+")


@dataclass(frozen=True)
class BlockPart:
    """One projection of a block. Neuron i is row i (`neuron_axis` 0) or column i (1) of a matrix.

    `bias` has one entry per neuron (gate, up) or one per output, which no permutation of neurons touches (down).

    Attributes:
        weight: The tensor that the matrix is, or lies in.
        start: Elements of the tensor before the matrix.
        pitch: Elements from a line of the matrix to the next; 0 if they follow each other.
        bias_start: Elements of the bias's tensor before the first neuron's.
        module: The module that holds the weight in transformers; None if it is called as the tensor is.
    """

    role: str
    weight: str
    neuron_axis: int
    dtype: str
    bias: str | None
    start: int = 0
    pitch: int = 0
    bias_start: int = 0
    module: str | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class ExpertPlace:
    """Expert number `index` of those that a module of transformers runs, each on the tokens routed to it.

    `share` is that of the tokens that an expert of the layer gets on average, if the config says; else 1.
    """

    module: str
    index: int
    share: float = 1.0


@dataclass(frozen=True)
class FFNBlock:
    """One feed-forward block: `neurons` bundles of one vector of `hidden` weights per part (gate, up, down).

    `expert` is None if the block runs on every token.
    """

    id: str
    neurons: int
    hidden: int
    activation: str
    parts: tuple[BlockPart, ...]
    expert: ExpertPlace | None = None

    def part(self, role: str) -> BlockPart:
        """The part of a role, which must be there."""
        return next(part for part in self.parts if part.role == role)

    @property
    def firing_part(self) -> BlockPart:
        """The projection that alone decides firing: the gate, or the up projection of a block without one."""
        return next(part for role in FIRING_ROLES for part in self.parts if part.role == role)

    @property
    def bundle_bytes(self) -> int:
        """Bytes of one neuron's weights."""
        return sum(self.hidden * part.element_bytes for part in self.parts)

    def region(self, part: BlockPart) -> Region:
        """Where the weights of a part lie in their tensor."""
        size = part.element_bytes
        lines, width = (self.neurons, self.hidden) if part.neuron_axis == 0 else (self.hidden, self.neurons)
        pitch = part.pitch or width
        return Region(part.weight, part.neuron_axis, part.start * size, pitch * size, lines, width * size)

    def bias_region(self, part: BlockPart, dtype: str) -> Region:
        """Where the bias of a part that has one per neuron lies in its tensor, of this dtype."""
        assert part.bias is not None
        size = DTYPE_BITS[dtype] // 8
        return Region(part.bias, 0, part.bias_start * size, size, self.neurons, size)


def experts_of(block_id: str) -> str | None:
    """What the experts of a layer are called together, if a block's id is that of one: `layers.3.experts`."""
    found = _EXPERT_ID.fullmatch(block_id)
    return found[1] if found else None


def biases_by_neuron(block: FFNBlock) -> Iterator[BlockPart]:
    """The parts that have a bias with an entry per neuron."""
    return (part for part in block.parts if part.bias is not None and part.role != "down")


def module_of(part: BlockPart) -> str:
    """The module that holds a part: its weight's name without the last step."""
    return part.weight.rpartition(".")[0] if part.module is None else part.module


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
