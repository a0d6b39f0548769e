"""Recall of rounded rows that decide firing in routed experts, against a loop over tokens of their definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.evaluation.gate_recall import rows_of_layout
from neuralink_cli.evaluation.recall_text import recall_on_text
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.index import read_flash_index
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.rewriting.relayout import relayout as relayout_command
from tests.checkpoints import write_random_placement
from tests.tiny_models import TEXT, build_model

Activation = Callable[[torch.Tensor], torch.Tensor]
# Of an experts module and the number of an expert: its gate rows `[neurons, hidden]`, and their bias.
Gate = Callable[[Any, int], tuple[torch.Tensor, torch.Tensor | None]]
TOKENS = 100


def halves(experts: Any, number: int) -> tuple[torch.Tensor, None]:
    return experts.gate_up_proj[number].chunk(2)[0], None


def alternating(experts: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return experts.gate_up_proj[number].T[::2], experts.gate_up_proj_bias[number][::2]


def swish_of_gpt_oss(values: torch.Tensor) -> torch.Tensor:
    gate = values.clamp(max=7)
    return gate * torch.sigmoid(1.702 * gate)


def figures_by_definition(
    model: Path, decoded: dict[str, np.ndarray], gate: Gate, act: Activation, threshold: float
) -> dict[str, list[float]]:
    """Of each expert: neurons that fire, those found, those read; their signal, and what is lost; tokens routed."""
    with quiet_transformers():
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
    counts = {name: np.zeros(6) for name in decoded if ".experts." in name}

    def hook(experts: Any, inputs: Any, layer: int) -> None:
        hidden, chosen = inputs[0], inputs[1]
        for state, numbers in zip(hidden, chosen, strict=True):
            for number in numbers.tolist():
                name = f"layers.{layer}.experts.{number}"
                rows, bias = gate(experts, number)
                added = torch.zeros(len(rows)) if bias is None else bias
                signal = act(rows @ state + added).abs()
                fires = signal > threshold
                found = act(torch.from_numpy(decoded[name]) @ state + added).abs() > threshold
                sums = (fires, fires & found, found, signal[fires], signal[fires & ~found])
                counts[name] += [*(float(each.sum()) for each in sums), 1]

    for layer, block in enumerate(dense.model.layers):
        if hasattr(block.mlp, "experts"):
            block.mlp.experts.register_forward_pre_hook(lambda module, inputs, layer=layer: hook(module, inputs, layer))
    with torch.inference_mode():
        for ids in read_token_sequences(model, TEXT, sequences=1, length=128):
            dense(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    return {name: each.tolist() for name, each in counts.items() if each[0]}


@pytest.mark.parametrize(
    ("family", "activation", "gate", "act", "threshold", "others"),
    [
        ("mixtral", "relu", halves, torch.relu, 0.0, []),
        ("mixtral", "silu", halves, torch.nn.functional.silu, 0.2, []),
        # A dense layer and a shared expert, which see all tokens, beside routed experts.
        ("qwen2_moe", "silu", halves, torch.nn.functional.silu, 0.2, ["layers.0", "layers.1.shared_expert"]),
        ("gpt_oss", None, alternating, swish_of_gpt_oss, 0.2, []),
    ],
)
def test_experts_count_the_tokens_routed_to_them(
    tmp_path: Path, family: str, activation: str | None, gate: Gate, act: Activation, threshold: float,
    others: list[str],
) -> None:  # fmt: skip
    model = build_model(tmp_path / "model", family, activation=activation, sizes={"hidden_size": 64})
    placement = write_random_placement(model, tmp_path / "placement", threshold=threshold)
    text = tmp_path / "text"
    text.write_text(TEXT)
    layout = tmp_path / "layout"
    options = RelayoutOptions(weights="q4_0", resident="gate")
    summary = relayout_command(model, placement, layout, options, measure_recall=recall_on_text(text, TOKENS))
    with BundledLayout(layout) as opened:
        decoded = {rows.block.id: rows.read() for rows in rows_of_layout(opened)}
    counts = figures_by_definition(model, decoded, gate, act, threshold)
    stated = json.loads((layout / "model.flash.json").read_text())["gate_recall"]
    blocks = {block.pop("id"): block for block in stated["blocks"]}
    assert {name for name, block in blocks.items() if "routed" in block} == counts.keys()
    assert sorted(blocks.keys() - counts.keys()) == others
    for name, (fired, kept, read, signal, lost, routed) in counts.items():
        expected = {"recall": kept / fired, "read_ratio": read / fired, "lost_signal": lost / signal, "routed": routed}
        assert blocks[name] == pytest.approx(expected, abs=1e-4), name
    assert sum(each[5] for each in counts.values()) == 2 * stated["tokens"] * (1 if others else 2)
    if not others:
        total = np.sum(list(counts.values()), axis=0)
        assert stated["total"]["recall"] == pytest.approx(total[1] / total[0], abs=1e-4)
    assert 0.8 < stated["total"]["recall"] < 1
    assert read_flash_index(layout).gate_recall == summary.gate_recall
    assert summary.gate_recall is not None
    assert "tokens routed to it" in str(summary.gate_recall) or others
