"""The FFN blocks of a checkpoint, and the tensors that hold their neurons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files.header import DTYPE_BITS

FIRING_ROLES = ("gate", "up")
_EXPERT_ID = re.compile(r"(.*\.experts)\.[0-9]+")


@dataclass(frozen=True, slots=True)
class BlockPart:
    """One projection of a block. Neuron i is row i (`neuron_axis` 0) or column i (1) of a matrix.

    `bias` has one entry per neuron (gate, up) or per output (down); reordering neurons leaves the latter as it is.

    Attributes:
        weight: The tensor that holds the matrix.
        start: Elements of the tensor before the matrix.
        pitch: Elements from one line of the matrix to the next; 0 if the lines are contiguous.
        bias_start: Elements of the bias tensor before the first neuron.
        bias_step: Elements of the bias tensor from one neuron to the next.
        lane, lanes: Of columns that alternate with those of other parts, as in `Region`.
        module: The module that holds the weight in transformers; None if it has the tensor's name.
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
    bias_step: int = 1
    lane: int = 0
    lanes: int = 1

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Expert number `index` of a transformers module that runs each expert on the tokens routed to it.

    `share` is the average share of tokens that an expert of the layer gets, if the config tells; else 1.
    """

    module: str
    index: int
    share: float = 1.0


@dataclass(frozen=True)
class UpValues:
    """What becomes of the values of up before they are multiplied with the activated gate.

    Attributes:
        limit: They are clamped to -limit and limit; None for no clamp.
        plus: Is added then.
    """

    limit: float | None
    plus: float


@dataclass(frozen=True, slots=True)
class FFNBlock:
    """One feed-forward block: `neurons` bundles of one vector of `hidden` weights per part (gate, up, down).

    `expert` is None if the block runs on every token; `up_values` if the values of up are multiplied as they are.
    """

    id: str
    neurons: int
    hidden: int
    activation: str
    parts: tuple[BlockPart, ...]
    expert: ExpertPlace | None = None
    up_values: UpValues | None = None

    def part(self, role: str) -> BlockPart:
        """The part of a role. It must exist."""
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
        """Where the weights of a part are in their tensor."""
        size = part.element_bytes
        lines, width = (self.neurons, self.hidden)
        if part.neuron_axis == 1:
            lines, width = self.hidden, self.neurons * part.lanes
        pitch, lanes = (part.pitch or width), (part.lane, part.lanes)
        return Region(part.weight, part.neuron_axis, part.start * size, pitch * size, lines, width * size, *lanes)

    def bias_region(self, part: BlockPart, dtype: str) -> Region:
        """Where the bias of a gate or up part is in its tensor of this dtype."""
        assert part.bias is not None
        size = DTYPE_BITS[dtype] // 8
        return Region(part.bias, 0, part.bias_start * size, part.bias_step * size, self.neurons, size)


def experts_of(block_id: str) -> str | None:
    """The common name of a layer's experts, such as `layers.3.experts`; None if the block is not an expert."""
    found = _EXPERT_ID.fullmatch(block_id)
    return found[1] if found else None


def biases_by_neuron(block: FFNBlock) -> Iterator[BlockPart]:
    """The parts with a bias that has one entry per neuron."""
    return (part for part in block.parts if part.bias is not None and part.role != "down")


def module_of(part: BlockPart) -> str:
    """The module that holds a part: its weight's name without the last step."""
    return part.weight.rpartition(".")[0] if part.module is None else part.module


@dataclass(frozen=True, slots=True)
class MovedPiece:
    """The weights or the bias of a block's neurons in one tensor."""

    block: str
    region: Region


def moved_pieces(checkpoint: Checkpoint, blocks: Sequence[FFNBlock]) -> dict[str, list[MovedPiece]]:
    """Everything that reordering neurons moves, by tensor."""
    moved: dict[str, list[MovedPiece]] = {}
    for block in blocks:
        for region in moved_regions(checkpoint, block):
            moved.setdefault(region.tensor, []).append(MovedPiece(block.id, region))
    return moved


def moved_regions(checkpoint: Checkpoint, block: FFNBlock) -> Iterator[Region]:
    """Everything that reordering a block's neurons moves."""
    yield from (block.region(part) for part in block.parts)
    for part in biases_by_neuron(block):
        assert part.bias is not None
        yield block.bias_region(part, checkpoint.place(part.bias).entry.dtype)
