"""Experts whose weights stay in flash: of each, only the neurons that fire for the tokens routed to it are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from neuralink_cli.profiling.experts import require_routed, route_to_experts
from neuralink_cli.sparse_models.sparse_block import FiringNeurons, ResidentRows

# The weights and biases of all experts, in every module of transformers that the experts' interface runs.
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class Expert:
    """The rows of an expert that decide firing, its neurons, and biases.

    `up_bias` `[neurons]` is that of its up projection, by slot, `output_bias` `[hidden]` that of its down projection.
    """

    rows: ResidentRows
    up_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    neurons: FiringNeurons


class SparseExperts:
    """Computes in the place of an experts module of transformers, whose weights it takes away.

    Args:
        module: Keeps its activation, and what else it has.

    Raises:
        UnsupportedError: The module is of an unknown kind.
    """

    def __init__(self, module: Any) -> None:
        require_routed(module)
        self._module = module
        self._gated = bool(getattr(module, "has_gate", True))
        self._experts: dict[int, Expert] = {}
        for name in _WEIGHTS:
            if hasattr(module, name):
                delattr(module, name)
                # Models initialise weights by name: give them an empty one to find.
                module.register_buffer(name, torch.empty(0), persistent=False)
        module.forward = self

    def attach(self, number: int, expert: Expert) -> None:
        """Set an expert, which becomes a part of the module, so that it moves with the model."""
        self._experts[number] = expert
        self._module.add_module(f"expert_{number}", expert.rows)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `route_to_experts`."""
        return route_to_experts(self._module, hidden_states, top_k_index, top_k_weights, self._compute)

    def _compute(self, number: int, _tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        expert, module = self._experts[number], self._module
        values = expert.rows(states)
        if not self._gated:
            values = module.act_fn(values)
        fired = expert.neurons.fired(values)
        output = torch.zeros_like(states)
        for part in expert.neurons.fetch(fired.any(dim=0).nonzero().squeeze(1), states):
            active = values[:, part.slots]
            if self._gated:
                up = linear(states, part.weights[:, 0], None if expert.up_bias is None else expert.up_bias[part.slots])
                active = module._apply_gate(self._as_one(active, up))
            output.addmm_(active.masked_fill(~fired[:, part.slots], 0), part.weights[:, -1])
        if expert.output_bias is not None:
            output += expert.output_bias
        return output

    def _as_one(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The values of gate and up, in the order in which the module has them."""
        if getattr(self._module, "is_concatenated", True):
            return torch.cat((gate, up), dim=-1)
        return torch.stack((gate, up), dim=-1).flatten(-2)
