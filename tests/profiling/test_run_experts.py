"""Experts run one by one, against the same worked out token by token, however a model keeps their weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from neuralink_cli.profiling.experts import ExpertRun, firing_bias, run_experts

TOKENS, HIDDEN, NEURONS, EXPERTS, CHOSEN = 11, 6, 5, 4, 2


class ToyExperts:
    """Experts as transformers keeps them; options that stand for its defaults are not there at all."""

    def __init__(self, gated: bool, concatenated: bool, transposed: bool, biased: bool, normed: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.num_experts = EXPERTS
        # By expert: gate and up `[neurons, hidden]`, down `[hidden, neurons]`, and their biases.
        self.gate, self.up = random(EXPERTS, NEURONS, HIDDEN), random(EXPERTS, NEURONS, HIDDEN)
        self.down = random(EXPERTS, HIDDEN, NEURONS)
        self.gate_bias, self.up_bias = random(EXPERTS, NEURONS) * biased, random(EXPERTS, NEURONS) * biased
        self.down_bias = random(EXPERTS, HIDDEN) * biased
        self.gated, self.concatenated, self.normed = gated, concatenated, normed
        if not gated:
            self.has_gate = False
        if not concatenated:
            self.is_concatenated = False
        if transposed:
            self.is_transposed = True
        if biased:
            self.has_bias = True
        if normed:
            self.has_post_expert_norm = True
            self.post_expert_norm = nn.RMSNorm(HIDDEN)
        first, bias = (self._both(self.gate, self.up), self._both(self.gate_bias, self.up_bias)) if gated else (
            self.up, self.up_bias
        )  # fmt: skip
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, first.mT if transposed else first)
        self.down_proj = self.down.mT if transposed else self.down
        if biased:
            setattr(self, f"{name}_bias", bias)
            self.down_proj_bias = self.down_bias

    def _both(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.concatenated:
            return torch.cat([gate, up], dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2)

    def act_fn(self, values: torch.Tensor) -> torch.Tensor:
        return silu(values)

    def _apply_gate(self, values: torch.Tensor) -> torch.Tensor:
        gate, up = values.chunk(2, dim=-1) if self.concatenated else (values[..., ::2], values[..., 1::2])
        return silu(gate) * up

    def of_token(self, expert: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The values that decide firing, the inputs of the down projection, and the output of one expert."""
        gate = self.gate[expert] @ hidden + self.gate_bias[expert]
        up = self.up[expert] @ hidden + self.up_bias[expert]
        inputs = silu(gate) * up if self.gated else silu(up)
        output = self.down[expert] @ inputs + self.down_bias[expert]
        return gate if self.gated else up, inputs, self.post_expert_norm(output) if self.normed else output


@pytest.mark.parametrize(
    ("gated", "concatenated", "transposed", "biased", "normed"),
    [choice for choice in product([True, False], repeat=5) if choice[0] or choice[1]],
)
def test_experts_compute_what_each_token_is_routed_to(
    gated: bool, concatenated: bool, transposed: bool, biased: bool, normed: bool
) -> None:
    experts = ToyExperts(gated, concatenated, transposed, biased, normed)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights = torch.rand(TOKENS, CHOSEN, generator=generator)
    # Of one more expert than there are: transformers sends there what another device computes. Expert 2 gets nothing.
    chosen = torch.stack([torch.tensor([0, 1, 3, EXPERTS])[torch.randperm(4, generator=generator)[:CHOSEN]]
                          for _ in range(TOKENS)])  # fmt: skip
    seen: dict[int, ExpertRun] = {}
    with torch.no_grad():
        output = run_experts(experts, hidden, chosen, weights, lambda run: seen.update({run.number: run}))
        expected = torch.zeros(TOKENS, HIDDEN)
        by_expert: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for token in range(TOKENS):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                if expert < EXPERTS:
                    gate, inputs, found = experts.of_token(expert, hidden[token])
                    expected[token] += weight * found
                    by_expert.setdefault(expert, []).append((token, gate, inputs))
    torch.testing.assert_close(output, expected)
    assert seen.keys() == by_expert.keys() == {0, 1, 3}
    for expert, run in seen.items():
        assert run.tokens.tolist() == [token for token, _, _ in by_expert[expert]]
        assert torch.equal(run.states, hidden[run.tokens])
        torch.testing.assert_close(run.gate, torch.stack([gate for _, gate, _ in by_expert[expert]]))
        torch.testing.assert_close(run.product, torch.stack([inputs for _, _, inputs in by_expert[expert]]))
        bias = firing_bias(experts, expert)
        assert (bias is not None) == biased
        if bias is not None:
            assert torch.equal(bias, (experts.gate_bias if gated else experts.up_bias)[expert])
