"""Runs the MoE experts of a layer one by one, so that each has to do with nothing but the tokens routed to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from neuralink_cli.errors import UnsupportedError

# The number of an expert, the tokens routed to it in ascending order, and for these tokens the values of its gate (or
# of its up projection, if it has no gate) and the inputs of its down projection.
SeeExpert = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
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
        return run_experts(module, hidden_states, top_k_index, top_k_weights, see_of[id(module)])

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
        gated = getattr(module, "has_gate", True)
        values = _project(module, "gate_up_proj" if gated else "up_proj", expert, states)
        if gated:
            gate = values.chunk(2, dim=-1)[0] if getattr(module, "is_concatenated", True) else values[..., ::2]
            product = module._apply_gate(values)
        else:
            gate, product = values, module.act_fn(values)
        see(expert, tokens, gate, product)
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


def require_routed(module: Any) -> None:
    """Check that the experts of a module can be run one by one.

    Raises:
        UnsupportedError: It is of an unknown kind.
    """
    if not hasattr(module, "_apply_gate") or not hasattr(module, "config"):
        raise UnsupportedError(f"experts of class {type(module).__name__} cannot be run one by one")


def _project(module: Any, name: str, expert: int, values: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else None
    return linear(values, weight.T if getattr(module, "is_transposed", False) else weight, bias)
