"""Masks the non-firing neurons of a dense model, as a reference that a sparse model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from neuralink_cli.activations.firing import FiringRule, firing_rule
from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import BlockPart
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.models.find_modules import find_module

Places = dict[str, tuple[str, int]]


@contextlib.contextmanager
def masked_neurons(model: Any, blocks: Sequence[FlashBlock], architecture: Architecture) -> Iterator[None]:
    """In this context, the dense model of a layout computes without the neurons that do not fire.

    Args:
        blocks: Blocks of the layout, with the rows that decide firing resident.

    Raises:
        UnsupportedError: The model has no module for a part.
    """
    with contextlib.ExitStack() as stack:
        for block in blocks:
            for handle in _mask_block(model, block, architecture):
                stack.callback(handle.remove)
        yield


def _mask_block(model: Any, block: FlashBlock, architecture: Architecture) -> Iterator[Any]:
    places: Places = {part.role: (part.source, part.neuron_axis) for part in block.parts}
    rows = next(kept for kept in block.resident if kept.kind == "rows")
    down = _module(model, block, "down", places["down"], architecture)
    if "up" not in places:
        rule = FiringRule(block.id, None, False)
        yield down.register_forward_pre_hook(_keep_firing(lambda values: rule.fires(values, block.threshold)))
        return
    gate = _module(model, block, rows.role, (rows.source, rows.neuron_axis), architecture)
    of_gate = firing_rule(block.id, block.activation, "gate")
    seen: list[torch.Tensor] = []

    def remember(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        seen[:] = [of_gate.fires(output, block.threshold)]

    yield gate.register_forward_hook(remember)
    yield down.register_forward_pre_hook(_keep_firing(lambda _values: seen.pop()))


def _keep_firing(fired: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].masked_fill(~fired(inputs[0]), 0), *inputs[1:])

    return hook


def _module(model: Any, block: FlashBlock, role: str, place: tuple[str, int], architecture: Architecture) -> Any:
    source, axis = place
    shape = (block.neurons, block.hidden) if axis == 0 else (block.hidden, block.neurons)
    return find_module(model, BlockPart(role, source, axis, block.dtype, None), shape, architecture)
