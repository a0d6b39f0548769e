"""Mixtures of experts on the command line: what is said of experts that saw few tokens, and tables that stay short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuralink_cli.cli.entry import run
from neuralink_cli.placement.placement import Placement
from tests.cli.conftest import Neuralink
from tests.tiny_models import TEXT, build_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with one dense layer and one of four experts beside a shared one, and its trace."""
    folder = tmp_path_factory.mktemp("mixture")
    model = build_model(folder / "model", "qwen2_moe")
    (folder / "text.txt").write_text(TEXT * 3)
    assert run(["profile", str(model), "--dataset", str(folder / "text.txt"), "-o", str(folder / "trace"),
                "--active-ratio", "0.3", "-q"]) == 0  # fmt: skip
    return model, folder / "trace"


def tokens_of_experts(placement: Path) -> dict[str, int]:
    with Placement(placement) as opened:
        return {block.id: block.tokens for block in opened.info.blocks if ".experts." in block.id}


def test_experts_that_saw_too_few_tokens_keep_their_order_and_are_named(
    neuralink: Neuralink, mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    _, trace = mixture
    assert neuralink("cluster", trace, "-o", tmp_path / "all", "--min-tokens", 0, "-q").code == 0
    seen = tokens_of_experts(tmp_path / "all")
    limit = sorted(seen.values())[2]
    outcome = neuralink("cluster", trace, "-o", tmp_path / "some", "--min-tokens", limit, "--order", "linked")
    rare = [name for name, tokens in seen.items() if tokens < limit]
    assert len(rare) == 2
    said = next(line for line in outcome.stderr.splitlines() if "experts saw fewer" in line)
    assert f"2 experts saw fewer than {limit:,} tokens and keep their original order" in said
    for name in rare:
        assert f"{name} ({seen[name]:,})" in said
    with Placement(tmp_path / "some") as placement:
        for block in placement.info.blocks:
            order = placement.blocks[block.id].order.tolist()
            if block.id in rare:
                assert (block.order, order) == ("original", list(range(block.neurons)))
            # Held-out figures are there whatever was ordered, so that those of all blocks add up.
            assert {"original", "frequency", "linked"} <= block.held_out[0].orders.keys()


def test_enough_tokens_for_all_are_not_worth_a_word(
    neuralink: Neuralink, mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    outcome = neuralink("cluster", mixture[1], "-o", tmp_path / "p", "--min-tokens", 1)
    assert outcome.code == 0
    assert "experts saw fewer" not in outcome.stderr


def test_the_experts_of_a_layer_are_one_row_and_all_of_them_in_the_json(
    neuralink: Neuralink, mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    model, trace = mixture
    text = trace.parent / "text.txt"
    table = neuralink("profile", model, "--dataset", text, "-o", tmp_path / "t", "--active-ratio", 0.3, "-q").stdout
    assert [line.split("  ")[0] for line in table.splitlines()[1:4]] == [
        "layers.0", "layers.1.experts (4)", "layers.1.shared_expert",
    ]  # fmt: skip
    assert (tmp_path / "t").read_bytes() == trace.read_bytes()
    table = neuralink("cluster", trace, "-o", tmp_path / "p", "-q").stdout
    assert sum(line.startswith("layers.1.experts (4)") for line in table.splitlines()) == 1
    outcome = neuralink("cluster", trace, "-o", tmp_path / "q", "-q", "--json")
    blocks = {block["name"]: block for block in json.loads(outcome.stdout)["blocks"]}
    experts = [name for name in blocks if ".experts." in name]
    assert len(experts) == 4
    # Every token goes to two of the four experts.
    ordering = blocks["layers.0"]["tokens"]
    assert sum(blocks[name]["tokens"] for name in experts) == 2 * ordering


@pytest.mark.parametrize("kind", ["bundled", "permuted"])
def test_bench_replays_experts(neuralink: Neuralink, mixture: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    model, trace = mixture
    assert neuralink("cluster", trace, "-o", tmp_path / "p", "-q").code == 0
    layout = tmp_path / "layout"
    assert neuralink("relayout", model, "--placement", tmp_path / "p", "-o", layout, "--layout", kind, "-q").code == 0
    outcome = neuralink("bench", layout, "--trace", trace, "--all-tokens", "--dram", "20%", "--json", "-q")
    assert outcome.code == 0
    report = json.loads(outcome.stdout)
    from neuralink_cli.activations.trace import Trace

    with Trace(trace) as opened:
        import numpy as np

        fired = sum(int(np.unpackbits(opened.fired(block)).sum()) for block in opened.info.blocks)
        per_token = fired / opened.info.tokens
    assert all(row["figures"]["active"] == pytest.approx(per_token) for row in report["rows"])
