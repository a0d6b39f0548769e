"""What is shaped like an FFN and in no block: an error, but for the parts that are left alone on purpose."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.coverage import Coverage, coverage_text, require_coverage
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import coverage_of
from tests.checkpoints import random_tensor, tensors_of, write_checkpoint, write_random_placement
from tests.conftest import ModelFactory
from tests.families import FAMILY
from tests.layouts import relayout

H, N = 20, 37
# Of a checkpoint of type llama with 2 layers: 3 matrices of 20 by 37 in float32.
BLOCKS = 2 * 3 * H * N * 4

Shapes = dict[str, tuple[int, ...]]


def measure(model: Path, *, allow_uncovered: bool = False) -> Coverage:
    with Checkpoint(model) as checkpoint:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint)))
        return require_coverage(checkpoint, blocks, allow_uncovered=allow_uncovered)


def with_tensors(folder: Path, more: Shapes) -> Path:
    random = np.random.default_rng(0)
    tensors = {**tensors_of("llama"), **{name: random_tensor(random, "F32", *shape) for name, shape in more.items()}}
    return write_checkpoint(folder / "model", "llama", tensors=tensors)


def gated(stem: str, n: int, h: int = H) -> Shapes:
    return {f"{stem}.gate_proj.weight": (n, h), f"{stem}.up_proj.weight": (n, h), f"{stem}.down_proj.weight": (h, n)}


@pytest.mark.parametrize("family", FAMILY)
def test_the_blocks_of_every_family_cover_its_ffns(model: ModelFactory, family: str) -> None:
    coverage = measure(model(family))
    # Gemma 3 also has a tower for images.
    assert bool(coverage.left_alone) == (family == "gemma3")
    assert (coverage.covered_bytes == coverage.ffn_bytes) == (family != "gemma3")


L = "model.layers.1"
# Tensors beside the blocks, and bytes of those that make an FFN.
UNCOVERED: dict[str, tuple[Shapes, int]] = {
    "experts": ({**gated(f"{L}.moe.experts.0", 8), **gated(f"{L}.moe.experts.1", 8)}, 2 * 3 * 8 * H * 4),
    "shared experts of a size of their own": (gated(f"{L}.moe.shared_experts", 12), 3 * 12 * H * 4),
    "as many neurons as the hidden size": (gated(f"{L}.moe.shared_experts", H), 3 * H * H * 4),
    "two in a layer, as LongCat": (gated(f"{L}.mlps.1", N), 3 * N * H * 4),
    "fused experts": (
        {f"{L}.moe.experts.gate_up_proj": (4, 16, H), f"{L}.moe.experts.down_proj": (4, H, 8)}, 4 * 24 * H * 4
    ),
    "fused experts, the other way around": (
        {f"{L}.moe.experts.gate_up_proj": (4, H, 16), f"{L}.moe.experts.down_proj": (4, 8, H)}, 4 * 24 * H * 4
    ),
    "without a gate": ({f"{L}.ffn.w1.weight": (9, H), f"{L}.ffn.w2.weight": (H, 9)}, 2 * 9 * H * 4),
    "unknown names": (
        {f"{L}.shared_mlp.input_linear.weight": (18, H), f"{L}.shared_mlp.output_linear.weight": (H, 9)}, 27 * H * 4
    ),
    "another list of layers": (gated("model.other_layers.0.mlp", N), 3 * N * H * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
def test_ffns_in_no_block_are_an_error(tmp_path: Path, name: str) -> None:
    more, size = UNCOVERED[name]
    model = with_tensors(tmp_path, more)
    with pytest.raises(
        UnsupportedError, match=f"^{model}: {len(more)} tensors shaped like FFN matrices are in no "
    ) as e:
        measure(model)
    assert repr(min(more)) in str(e.value)
    assert "--allow-uncovered" in str(e.value)
    assert measure(model, allow_uncovered=True) == Coverage(BLOCKS + size, BLOCKS, ())


OTHERS: dict[str, Shapes] = {
    "attention with the shapes of an FFN": {
        f"{L}.self_attn.q_proj.weight": (N, H), f"{L}.self_attn.o_proj.weight": (H, N),
        f"{L}.self_attn.q_a_proj.weight": (8, H), f"{L}.self_attn.q_b_proj.weight": (H, 8),
        f"{L}.attn.c_attn.weight": (3 * H, H), f"{L}.attn.c_proj.weight": (H, H),
    },
    "embeddings and head": {"lm_head.weight": (N, H), "embed.weight": (H, N)},
    "routers": {f"{L}.moe.gate.weight": (4, H), f"{L}.moe.shared_expert_gate.weight": (1, H)},
    "an adapter": {f"{L}.adapter.down_proj.weight": (8, H), f"{L}.adapter.up_proj.weight": (H, 8)},
    "a pair that is no FFN": {
        f"{L}.laurel.linear_left.weight": (8, H), f"{L}.laurel.linear_right.weight": (H, 8),
        f"{L}.per_layer_input_gate.weight": (8, H), f"{L}.per_layer_projection.weight": (H, 8),
    },
    "a mixer": {f"{L}.mamba.in_proj.weight": (2 * N, H), f"{L}.mamba.out_proj.weight": (H, N)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_ffn_is_not_taken_for_one(tmp_path: Path, name: str) -> None:
    assert measure(with_tensors(tmp_path, OTHERS[name])) == Coverage(BLOCKS, BLOCKS, ())


def test_parts_left_alone_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers that predict further tokens, whether in a list of their own or behind the last layer; vision towers."""
    tower = {"vision_tower.layers.0.mlp.fc1.weight": (9, 8), "vision_tower.layers.0.mlp.fc2.weight": (8, 9)}
    model = with_tensors(tmp_path, {**gated("mtp.layers.0.mlp", N), **gated("model.layers.2.mlp", N), **tower})
    with caplog.at_level(logging.WARNING):
        coverage = measure(model)
    aside = 6 * N * H * 4 + 2 * 9 * 8 * 4
    assert coverage == Coverage(BLOCKS + aside, BLOCKS, ("model.layers.2", "mtp.layers", "vision_tower.layers"))
    assert (
        "left as they are, since they are not part of the text model: model.layers.2, mtp.layers, vision_tower.layers"
        in caplog.text
    )


def test_a_layer_that_the_config_counts_is_not_left_alone(tmp_path: Path) -> None:
    """A description that looks for the number of layers under another key finds blocks in the first of them only."""
    model = with_tensors(tmp_path, {})
    with Checkpoint(model) as checkpoint:
        whole = choose_architecture(describe(checkpoint))
        wrong = replace(whole, blocks=tuple(replace(block, layer_keys=("one",)) for block in whole.blocks))
        checkpoint.config["one"] = 1
        blocks = find_blocks(checkpoint, wrong)
        assert [block.id for block in blocks] == ["layers.0"]
        with pytest.raises(
            UnsupportedError, match=r"3 tensors shaped like FFN matrices .* cover 50 % of the FFN bytes"
        ):
            require_coverage(checkpoint, blocks)


@pytest.mark.parametrize("uncovered", [{}, gated(f"{L}.moe.shared_experts", 12), gated("mtp.layers.0.mlp", N)])
def test_a_layout_covers_what_the_blocks_of_its_source_do(tmp_path: Path, uncovered: Shapes) -> None:
    model = with_tensors(tmp_path, uncovered)
    placement = write_random_placement(model, tmp_path / "placement")
    relayout(model, placement, tmp_path / "layout", resident="gate")
    with BundledLayout(tmp_path / "layout") as layout:
        assert coverage_of(layout) == measure(model, allow_uncovered=True)


def test_experts_that_a_description_leaves_out_are_found(model: ModelFactory) -> None:
    with Checkpoint(model("deepseek_v3")) as checkpoint:
        whole = choose_architecture(describe(checkpoint))

        def only(*ids: str) -> Architecture:
            return replace(whole, blocks=tuple(block for block in whole.blocks if block.id.endswith(ids)))

        for architecture, missing in (
            (only("${layer}", "${expert}"), "'model.layers.1.mlp.shared_experts.down_proj.weight'"),
            (only("${layer}", "shared_experts"), "'model.layers.1.mlp.experts.0.down_proj.weight'"),
        ):
            with pytest.raises(UnsupportedError, match=missing):
                require_coverage(checkpoint, find_blocks(checkpoint, architecture))


def test_a_share_is_never_rounded_up_to_all() -> None:
    assert coverage_text(10, 10) == "the blocks cover 100 % of the FFN bytes"
    assert coverage_text(99_999, 100_000) == "the blocks cover 99.9 % of the FFN bytes"
