"""Which tensors count as dense matrices."""

from __future__ import annotations

import pytest

from neuralink_cli.weight_formats.dense import may_be_rounded


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "BF16", (64, 64), True),
        ("model.embed_tokens.weight", "F16", (7, 32), True),
        ("lm_head.weight", "F32", (100, 96), True),
        ("transformer.h.0.attn.c_attn.weight", "F32", (32, 96), True),
        ("model.layers.0.self_attn.gate_proj.weight", "F32", (32, 96), True),
        ("model.layers.0.self_attn.q_proj.weight", "BF16", (64, 48), False),
        ("model.layers.0.self_attn.q_proj.weight", "F8_E4M3", (64, 64), False),
        ("model.layers.0.self_attn.q_proj.weight", "I64", (64, 64), False),
        ("model.layers.0.self_attn.q_proj.bias", "BF16", (64,), False),
        ("model.norm.weight", "BF16", (64,), False),
        ("model.layers.0.input_layernorm.weight", "BF16", (1, 64), False),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "F32", (32, 64), False),
        ("model.layers.0.mlp.gate.weight", "BF16", (64, 64), False),
        ("model.layers.0.block_sparse_moe.router.layer.weight", "BF16", (64, 64), False),
        ("model.layers.0.mlp.shared_expert_gate.weight", "BF16", (1, 64), False),
        ("backbone.layers.0.mixer.conv1d.weight", "BF16", (64, 1, 32), False),
        ("backbone.layers.0.mixer.A_log", "F32", (64, 32), False),
        ("model.embed_tokens.weight", "F16", (0, 32), False),
    ],
)
def test_matrices_are_rounded_and_nothing_else(name: str, dtype: str, shape: tuple[int, ...], expected: bool) -> None:
    assert may_be_rounded(name, dtype, shape, "q8_0") == expected
