"""What `neuralink cluster` prints, on a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from neuralink_cli.placement.gain import stored_by_layer, stored_by_source, stored_in_total
from neuralink_cli.placement.placement import STORED, Placement
from tests.cli.conftest import Neuralink
from tests.traces import write_clustered_trace, write_routed_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    name = "a-dataset-with-a-rather-long-name-that-ends-in.jsonl"
    write_clustered_trace(tmp_path / "t", neurons=60, source=name)
    return tmp_path / "t"


def test_tables_fit_80_columns_and_a_sentence_says_the_result(
    neuralink: Neuralink, trace: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    save_file({f"layers.{k}": rng.permutation(60) for k in range(3)}, tmp_path / "o.safetensors")
    arguments = ("--order-from", tmp_path / "o.safetensors", "--order", "reverse-cuthill-mckee")
    outcome = neuralink("cluster", trace, "-o", tmp_path / "p", *arguments, "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []
    assert lines[0].startswith("Measured on ")
    caption, orders, stored, _ = outcome.stdout.split("\n\n")
    words = " ".join(caption.split())
    for title in orders.splitlines()[0].split()[1:]:
        assert f"{title}: " in words
    named = [line.split()[0] for line in orders.splitlines()[1:]]
    assert named == ["original", "frequency", "reverse-cuthill-mckee", "linked", "imported"]
    labels = [line.split()[0] for line in stored.splitlines()[1:]]
    assert labels == [
        "layers.0", "layers.1", "layers.2", "a-dataset...s-in.jsonl-0", "a-dataset...s-in.jsonl-1", "total",
    ]  # fmt: skip
    with Placement(tmp_path / "p") as placement:
        (gain,) = [gain for gain in placement.info.gains if gain.source is None and gain.order == STORED]
    last = " ".join(outcome.stdout.split()).rsplit(f"{tmp_path / 'p'} stores ")[1]
    assert f"on ufs4.0 it gains {gain.gain} over the original order read the same way" in last
    assert last.endswith("95% intervals over sequences.")


def test_what_is_stored_in_several_orders_has_figures_too(neuralink: Neuralink, tmp_path: Path) -> None:
    trace = write_routed_trace(tmp_path / "t")
    assert neuralink("cluster", trace, "-o", tmp_path / "p", "--min-tokens", 0, "--order", "linked", "-q").code == 0
    with Placement(tmp_path / "p") as placement:
        header = placement.info
    chosen = {block.order for block in header.blocks}
    (layer,), total = stored_by_layer(header), stored_in_total(header)
    assert layer.order == total.order == (chosen.pop() if len(chosen) == 1 else "mixed")
    assert layer.figures == total.figures == stored_by_source(header)[0].figures
    (gain,) = [gain for gain in header.gains if gain.source is None and gain.order == STORED]
    assert total.figures is not None
    assert total.figures.gain == pytest.approx(gain.gain.value)
    assert total.figures.gain_over_naive == pytest.approx(gain.gain_over_naive.value)


def test_an_order_that_could_not_be_measured_says_so(neuralink: Neuralink, trace: Path, tmp_path: Path) -> None:
    outcome = neuralink("cluster", trace, "-o", tmp_path / "p", "--held-out", 0, "--order", "linked", "-q")
    assert outcome.code == 0
    assert "no held-out tokens: the gain of the order is not known" in outcome.stdout
    assert " ".join(outcome.stdout.split()).endswith("stores the linked order of 3 blocks.")
