"""Runs the MoE experts of a layer one by one, so that each has to do with nothing but the tokens routed to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from neuralink_cli.errors import UnsupportedError


@dataclass(frozen=True)
class ExpertRun:
    """What an expert computes for the tokens routed to it.

    Attributes:
        number: That of the expert.
        tokens: int64 `[tokens]`, which tokens of the batch, ascending.
        states: Their hidden states `[tokens, hidden]`.
        gate: The values of its gate `[tokens, neurons]`, not activated; of its up projection, if it has no gate.
        product: The inputs of its down projection `[tokens, neurons]`.
    """

    number: int
    tokens: torch.Tensor
    states: torch.Tensor
    gate: torch.Tensor
    product: torch.Tensor


SeeExpert = Callable[[ExpertRun], None]
# The number of an expert, the tokens routed to it, and their hidden states, to what its down projection gives.
ComputeExpert = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
_NAME = "neuralink"


@contextlib.contextmanager
def experts_seen(modules: Sequence[tuple[Any, SeeExpert]]) -> Iterator[None]:
    """Within the block, every experts module calls its function for each expert that it runs.

    Raises:
        UnsupportedError: A module is of an unknown kind.
    """
    if not modules:
        yield
        return
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise UnsupportedError(
            "mixtures of experts need a newer transformers", fix="pip install -U 'transformers>=5'"
        ) from None
    see_of = {id(module): see for module, see in modules}

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # One of a layer without blocks has the same config.
        see = see_of.get(id(module), lambda _run: None)
        return run_experts(module, hidden_states, top_k_index, top_k_weights, see)

    with contextlib.ExitStack() as stack:
        ALL_EXPERTS_FUNCTIONS[_NAME] = forward
        stack.callback(ALL_EXPERTS_FUNCTIONS.__delitem__, _NAME)
        for module, _ in modules:
            require_routed(module)
            config = module.config
            stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = _NAME
        yield


def run_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, see: SeeExpert
) -> torch.Tensor:
    """Compute what an experts module of transformers computes; arguments as of `route_to_experts`.

    Args:
        see: May change the inputs of the down projection in place.
    """

    def compute(expert: int, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        values = _project(module, _firing_name(module), expert, states)
        product = module._apply_gate(values) if _gated(module) else module.act_fn(values)
        see(ExpertRun(expert, tokens, states, _firing_part(module, values), product))
        return _project(module, "down_proj", expert, product)

    return route_to_experts(module, hidden_states, top_k_index, top_k_weights, compute)


def route_to_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    compute: ComputeExpert,
) -> torch.Tensor:
    """The weighted sum of what the experts of a module compute, each for the tokens routed to it.

    Args:
        hidden_states: `[tokens, hidden]`.
        top_k_index, top_k_weights: `[tokens, k]`, the experts of each token and their routing weights.
        compute: Called once for each expert that has tokens.
    """
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= module.num_experts:
            continue
        tokens, choice = torch.where(top_k_index == expert)
        found = compute(int(expert), tokens, hidden_states[tokens])
        if getattr(module, "has_post_expert_norm", False):
            found = module.post_expert_norm(found)
        output.index_add_(0, tokens, (found * top_k_weights[tokens, choice, None]).to(output.dtype))
    return output


def firing_bias(module: Any, expert: int) -> torch.Tensor | None:
    """The bias `[neurons]` of the gate of an expert (of its up projection, if it has no gate); None if it has none."""
    if not getattr(module, "has_bias", False):
        return None
    return _firing_part(module, getattr(module, f"{_firing_name(module)}_bias")[expert])


def require_routed(module: Any) -> None:
    """Check that the experts of a module can be run one by one.

    Raises:
        UnsupportedError: It is of an unknown kind.
    """
    if not hasattr(module, "_apply_gate") or not hasattr(module, "config"):
        raise UnsupportedError(f"experts of class {type(module).__name__} cannot be run one by one")


def _gated(module: Any) -> bool:
    return bool(getattr(module, "has_gate", True))


def _firing_name(module: Any) -> str:
    return "gate_up_proj" if _gated(module) else "up_proj"


def _firing_part(module: Any, values: torch.Tensor) -> torch.Tensor:
    """Of values `[..., outputs]` of the projection that holds the gate, those of the gate."""
    if not _gated(module):
        return values
    return values.chunk(2, dim=-1)[0] if getattr(module, "is_concatenated", True) else values[..., ::2]


def _project(module: Any, name: str, expert: int, values: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else None
    return linear(values, weight.T if getattr(module, "is_transposed", False) else weight, bias)
