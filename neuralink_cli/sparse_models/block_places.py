"""Where in a model of transformers the parts of a layout's block are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.block_modules import module_names
from neuralink_cli.architectures.blocks import BlockPart
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.layout.plan import BundlePart, FlashBlock, ResidentTensor
from neuralink_cli.models.find_modules import find_module
from neuralink_cli.profiling.firing import FiringRule, firing_rule


@dataclass(frozen=True)
class BlockPlaces:
    """The modules of a block.

    Attributes:
        firing: The role whose values decide firing: gate, or up without one.
        experts: Name of the module that runs all experts of the layer; then no part has a module of its own.
        parts: By role, the part as the module that holds it is found, and the shape of that module's weight.
        shares: By role, (k, n) if its values are the k-th of n that the module gives, counted from 1.
    """

    firing: str
    experts: str | None
    parts: Mapping[str, tuple[BlockPart, tuple[int, int]]]
    shares: Mapping[str, tuple[int, int]]

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.firing == "gate"

    @property
    def fused(self) -> bool:
        """Whether one module computes both gate and up."""
        return self.gated and self.shares["gate"][1] == 2

    @property
    def gate_first(self) -> bool:
        """Whether it gives the values of the gate first."""
        return self.shares["gate"][0] == 1

    def find(self, model: Any, role: str, architecture: Architecture) -> Any:
        """The module of a role.

        Raises:
            UnsupportedError: The model has none whose weight has this shape.
        """
        part, shape = self.parts[role]
        return find_module(model, part, shape, architecture)


def block_places(block: FlashBlock, architecture: Architecture) -> BlockPlaces:
    """The modules of a block with resident rows, as the architecture names them.

    Raises:
        UnsupportedError: It has no such block, or the block's parts share a module in a way that is not known.
    """
    rows = next(kept for kept in block.resident if kept.kind == "rows")
    stored: dict[str, BundlePart | ResidentTensor] = {rows.role: rows, **{part.role: part for part in block.parts}}
    names = module_names(architecture, block.id, {role: part.source for role, part in stored.items()})
    if names.experts is None and not _known(names.parts, names.shares):
        raise UnsupportedError(f"{block.id} shares a module in a way that `run` does not know")
    parts = {}
    for role, part in stored.items():
        neurons = block.neurons * names.shares[role][1]
        shape = (neurons, block.hidden) if part.neuron_axis == 0 else (block.hidden, neurons)
        parts[role] = (
            BlockPart(role, part.source, part.neuron_axis, block.dtype, None, module=names.parts[role]),
            shape,
        )
    return BlockPlaces(rows.role, names.experts, parts, names.shares)


def deciding_rule(block: FlashBlock) -> FiringRule:
    """What decides firing: the activated values of the gate, or without a gate the inputs of the down projection."""
    if len(block.parts) > 1:
        return firing_rule(block.id, block.activation, "gate")
    return FiringRule(block.id, None, False)


def _known(modules: Mapping[str, str], shares: Mapping[str, tuple[int, int]]) -> bool:
    """Whether every part has a module to itself, or gate and up have one for the two of them."""
    if all(share == (1, 1) for share in shares.values()):
        return True
    alike = modules.get("gate") == modules["up"] and shares["down"] == (1, 1)
    return alike and {shares["gate"], shares["up"]} == {(1, 2), (2, 2)}
