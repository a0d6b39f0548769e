"""Finds the modules of a running model that compute the FFN blocks of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import BlockPart, FFNBlock
from neuralink_cli.models.find_modules import find_activation, find_experts, find_module
from neuralink_cli.profiling.firing import firing_rule
from neuralink_cli.profiling.recorder import HookedBlock

Shapes = Mapping[str, Sequence[int]]


def hooked_blocks(
    model: Any, blocks: Sequence[FFNBlock], shapes: Shapes, architecture: Architecture, signal: str
) -> list[HookedBlock]:
    """Where in a model to hook the firing signal of every block.

    Args:
        shapes: The shapes of the checkpoint's tensors, by name.

    Raises:
        UnsupportedError: The model has no module for a block, or its activation is not known.
    """
    before = signal == "intermediate"
    found = []
    # Looked up once per layer, by its last expert: an MoE model has thousands of blocks.
    last = {block.expert.module: block.expert for block in blocks if block.expert is not None}
    experts = {name: find_experts(model, place, architecture) for name, place in last.items()}
    for block in blocks:
        part = block.part("down") if before else block.firing_part
        if block.expert is not None:
            rule = firing_rule(block.id, block.activation, signal)
            module = experts[block.expert.module]
            found.append(HookedBlock(module, before, block.neurons, rule, expert=block.expert.index))
        else:
            module = find_module(model, part, shapes[part.weight], architecture)
            first = 0 if before else _first(block, part)
            activation = None if before else find_activation(model, module, block.activation)
            rule = firing_rule(block.id, block.activation, signal, activation)
            found.append(HookedBlock(module, before, block.neurons, rule, first, activation=activation))
    return found


def _first(block: FFNBlock, part: BlockPart) -> int:
    """Where a part's neurons start among the outputs of its module."""
    return part.start // block.hidden if part.neuron_axis == 0 else part.start
