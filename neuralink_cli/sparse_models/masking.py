"""Masks the non-firing neurons of a dense model, as a reference that a sparse model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import ExpertPlace
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.models.find_modules import find_experts
from neuralink_cli.profiling.experts import ExpertRun, SeeExpert, experts_seen
from neuralink_cli.sparse_models.block_places import BlockPlaces, block_places, deciding_rule


@contextlib.contextmanager
def masked_neurons(model: Any, blocks: Sequence[FlashBlock], architecture: Architecture) -> Iterator[None]:
    """In this context, the dense model of a layout computes without the neurons that do not fire.

    Args:
        blocks: Blocks of the layout, with the rows that decide firing resident.

    Raises:
        UnsupportedError: The model has no module for a part.
    """
    experts: dict[str, dict[int, FlashBlock]] = {}
    with contextlib.ExitStack() as stack:
        for block in blocks:
            places = block_places(block, architecture)
            if places.experts is not None and block.expert is not None:
                experts.setdefault(places.experts, {})[block.expert] = block
                continue
            for handle in _mask_block(model, block, places, architecture):
                stack.callback(handle.remove)
        stack.enter_context(
            experts_seen(
                [
                    (find_experts(model, ExpertPlace(name, max(of_layer)), architecture), _mask_experts(of_layer))
                    for name, of_layer in experts.items()
                ]
            )
        )
        yield


def _mask_experts(blocks: dict[int, FlashBlock]) -> SeeExpert:
    """What takes the values of the neurons that do not fire out of the inputs of every expert's down projection."""
    gated = {number: len(block.parts) > 1 for number, block in blocks.items()}
    rules = {number: deciding_rule(block) for number, block in blocks.items()}

    def see(run: ExpertRun) -> None:
        deciding = run.gate if gated[run.number] else run.product
        run.product.masked_fill_(~rules[run.number].fires(deciding, blocks[run.number].threshold), 0)

    return see


def _mask_block(model: Any, block: FlashBlock, places: BlockPlaces, architecture: Architecture) -> Iterator[Any]:
    down = places.find(model, "down", architecture)
    rule = deciding_rule(block)
    if not places.gated:
        yield down.register_forward_pre_hook(_keep_firing(lambda values: rule.fires(values, block.threshold)))
        return
    gate = places.find(model, "gate", architecture)
    part, of = places.shares["gate"]
    seen: list[torch.Tensor] = []

    def remember(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        seen[:] = [rule.fires(output.chunk(of, dim=-1)[part - 1], block.threshold)]

    yield gate.register_forward_hook(remember)
    yield down.register_forward_pre_hook(_keep_firing(lambda _values: seen.pop()))


def _keep_firing(fired: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].masked_fill(~fired(inputs[0]), 0), *inputs[1:])

    return hook
