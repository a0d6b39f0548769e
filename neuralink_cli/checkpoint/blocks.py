"""The FFN blocks of a checkpoint: which tensors hold their neurons, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from neuralink_cli.checkpoint.architecture import Architecture, BlockPattern, WeightPattern
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.header import DTYPE_BITS
from neuralink_cli.errors import InputError, UnsupportedError

FIRING_ROLES = ("gate", "up")


@dataclass(frozen=True)
class BlockPart:
    """One projection of a block. Neuron i is row i (`neuron_axis` 0) or column i (1) of the 2-D tensor `weight`.

    `bias` has one entry per neuron (gate, up) or one per output, which no permutation of neurons touches (down).
    """

    role: str
    weight: str
    neuron_axis: int
    dtype: str
    bias: str | None

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class FFNBlock:
    """One feed-forward block: `neurons` bundles of one vector of `hidden` weights per part (gate, up, down)."""

    id: str
    neurons: int
    hidden: int
    activation: str
    parts: tuple[BlockPart, ...]

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


def find_blocks(checkpoint: Checkpoint, architecture: Architecture) -> tuple[FFNBlock, ...]:
    """All FFN blocks of a checkpoint, in layer order.

    Raises:
        InputError: A tensor is missing or its shape does not fit the others.
        UnsupportedError: A dtype whose columns are not whole bytes.
    """
    prefix = _find_prefix(checkpoint, architecture)
    activation = _activation(checkpoint, architecture)
    return tuple(
        _build_block(checkpoint, pattern, prefix, layer, activation)
        for layer in range(_count_layers(checkpoint, architecture, prefix))
        for pattern in architecture.blocks
    )


def module_of(part: BlockPart) -> str:
    """The module that holds a part: its weight's name without the last step."""
    return part.weight.rpartition(".")[0]


def _find_prefix(checkpoint: Checkpoint, architecture: Architecture) -> str:
    first = _name(architecture.blocks[0].parts["up"].weight, 0)
    for prefix in architecture.prefixes:
        if prefix + first in checkpoint:
            return prefix
    raise InputError(
        f"tensor {architecture.prefixes[0] + first!r} of architecture {architecture.name!r} is missing",
        where=checkpoint.directory,
    )


def _count_layers(checkpoint: Checkpoint, architecture: Architecture, prefix: str) -> int:
    for key in architecture.layer_keys:
        if type(checkpoint.config.get(key)) is int and checkpoint.config[key] > 0:
            return int(checkpoint.config[key])
    layers = 0
    while prefix + _name(architecture.blocks[0].parts["up"].weight, layers) in checkpoint:
        layers += 1
    return layers


def _activation(checkpoint: Checkpoint, architecture: Architecture) -> str:
    for key in architecture.activation_keys:
        if isinstance(checkpoint.config.get(key), str):
            return str(checkpoint.config[key])
    if architecture.activation_default is None:
        keys: Sequence[str] = architecture.activation_keys
        raise InputError(
            f"does not name the activation ({' or '.join(keys)})", where=checkpoint.directory / "config.json"
        )
    return architecture.activation_default


def _build_block(checkpoint: Checkpoint, pattern: BlockPattern, prefix: str, layer: int, activation: str) -> FFNBlock:
    parts = tuple(_build_part(checkpoint, role, weight, prefix, layer) for role, weight in pattern.parts.items())
    shapes = [checkpoint.place(part.weight).entry.shape for part in parts]
    neurons, hidden = shapes[0][parts[0].neuron_axis], shapes[0][1 - parts[0].neuron_axis]
    for part, shape in zip(parts, shapes, strict=True):
        if (shape[part.neuron_axis], shape[1 - part.neuron_axis]) != (neurons, hidden):
            raise InputError(
                f"tensor {part.weight!r} of shape {list(shape)} does not fit {parts[0].weight!r} of {list(shapes[0])}",
                where=checkpoint.directory,
            )
        expected = hidden if part.role == "down" else neurons
        if part.bias is not None and checkpoint.place(part.bias).entry.shape != (expected,):
            found = list(checkpoint.place(part.bias).entry.shape)
            raise InputError(f"tensor {part.bias!r} has shape {found}, not [{expected}]", where=checkpoint.directory)
    return FFNBlock(_name(pattern.id, layer), neurons, hidden, activation, parts)


def _build_part(checkpoint: Checkpoint, role: str, pattern: WeightPattern, prefix: str, layer: int) -> BlockPart:
    weight = prefix + _name(pattern.weight, layer)
    entry = checkpoint.place(weight).entry
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise InputError(
            f"tensor {weight!r} has shape {list(entry.shape)}, a matrix is needed", where=checkpoint.directory
        )
    bias = None if pattern.bias is None else prefix + _name(pattern.bias, layer)
    if bias is not None and bias not in checkpoint:
        bias = None
    for name in (weight, bias):
        if name is not None and DTYPE_BITS[checkpoint.place(name).entry.dtype] % 8:
            raise UnsupportedError(
                f"tensor {name!r} has dtype {checkpoint.place(name).entry.dtype}, whose columns are not whole bytes",
                where=checkpoint.directory,
            )
    return BlockPart(role, weight, pattern.neuron_axis, entry.dtype, bias)


def _name(pattern: str, layer: int) -> str:
    return Template(pattern).substitute(layer=layer)
