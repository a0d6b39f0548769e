"""`neuralink bench` from the command line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint, write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory, Made

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def made(layouts: LayoutFactory) -> Made:
    return layouts.bundled()


@pytest.fixture(scope="module")
def trace(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_trace(made.model, tmp_path_factory.mktemp("trace") / "t.safetensors")


def test_prints_a_table_that_fits(neuralink: Neuralink, made: Made, trace: Path) -> None:
    outcome = neuralink("bench", made.layout, "--trace", trace, "-q", "--dram", "20%")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith("120 tokens, ")
    assert max(map(len, lines)) <= 80
    said = [k for k, line in enumerate(lines) if line.startswith("linked: gain ")]
    assert len(said) == 2
    assert "gain: the time of the original order" in " ".join(lines)
    for title, last in zip(("ufs4.0, no cache", "ufs4.0, cache"), said, strict=True):
        table = lines[next(k for k, text in enumerate(lines) if text.startswith(title)) :]
        # The mean times of the rows that the sentence below the table is about: of the original order, and of linked.
        original = table.index(next(text for text in table if text.startswith("original")))
        naive, same, own = (table[k].split()[-4] for k in (original, original + 1, original + 5))
        sentence = " ".join(lines[last:]).partition("  ")[0]
        words = f"95% intervals. {own} us a token; the original order, read the same way, {same}; naively {naive}"
        assert words in sentence
    labels = [line[:14].strip() for line in lines if re.search(r" [0-9]+%  ", line)]
    assert (
        labels
        == [label for name in ("unbundled", "original", "frequency", "linked") for label in (name, "+ collapse")] * 2
    )
    assert [line for line in lines if line.startswith("ufs4.0, ")] == [
        "ufs4.0, no cache; times in us",
        "ufs4.0, cache linked-s3fifo of 14 neurons, 2.2 kB; times in us",
    ]


def test_compares_layouts_placements_and_devices(
    neuralink: Neuralink, made: Made, trace: Path, layouts: LayoutFactory
) -> None:
    permuted = layouts.permuted()
    outcome = neuralink(
        "bench", made.layout, permuted.layout, made.placement, "--trace", trace, "--device", "ufs4.0", "--device",
        "nvme", "--cache", "none", "--json", "-q",
    )  # fmt: skip
    assert outcome.code == 0
    rows = json.loads(outcome.stdout)["rows"]
    assert len(rows) == 2 * 2 * 6
    own = [row for row in rows if row["way"]["layout"] and row["way"]["device"] == "nvme" and row["way"]["collapse"]]
    assert [row["way"]["layout"] for row in own] == [str(made.layout), str(permuted.layout), str(made.placement)]
    # The same order in three forms: the same reads.
    assert own[0]["figures"] == own[1]["figures"] == own[2]["figures"]
    table = neuralink("bench", made.layout, made.placement, "--trace", trace, "--cache", "none", "-q").stdout
    assert table.startswith(f"A: {made.layout}\nB: {made.placement}\n")
    assert "\nA linked  " in table


def test_csv_has_a_line_for_every_row(neuralink: Neuralink, made: Made, trace: Path, tmp_path: Path) -> None:
    arguments = ("bench", made.layout, "--trace", trace, "-q", "--json", "--dram", "20%", "--csv", tmp_path / "b.csv")
    outcome = neuralink(*arguments, "--bundle-bytes", 4096, "--bundle-bytes", 16384)
    assert outcome.code == 0
    with (tmp_path / "b.csv").open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    rows = json.loads(outcome.stdout)["rows"]
    assert len(lines) == len(rows) == 32
    for line, row in zip(lines, rows, strict=True):
        assert float(line["gain"]) == row["gain"]["value"]
        assert float(line["gain_over_naive_low"]) == row["gain_over_naive"]["low"]
        assert float(line["io_p99"]) == row["figures"]["io_p99"]
        assert int(line["bundle_bytes"]) == row["way"]["bundle_bytes"]
    again = neuralink(*arguments)
    assert again.code == 6
    assert "b.csv" in again.error
    assert neuralink(*arguments, "--overwrite").code == 0


def test_a_gate_for_continuous_integration(neuralink: Neuralink, made: Made, trace: Path) -> None:
    arguments = ("bench", made.layout, "--trace", trace, "-q", "--device", "ufs4.0", "--dram", "20%")
    rows = json.loads(neuralink(*arguments, "--json").stdout)["rows"]
    row = next(r for r in rows if r["way"]["layout"] and r["way"]["collapse"] and r["way"]["cache"] != "none")
    for option, key, words in (
        ("--fail-below", "gain", "gain"),
        ("--fail-below-total", "gain_over_naive", "gain over naive reading"),
    ):
        gain = row[key]
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert neuralink(*arguments, option, gain["low"] - 0.01).code == 0
        failed = neuralink(*arguments, option, gain["low"] + 0.01)
        assert failed.code == 1
        assert "\nlinked  " in failed.stdout
        assert f"{words} {gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f}) is not reliably" in failed.stderr


def test_reads_for_real(neuralink: Neuralink, made: Made, trace: Path) -> None:
    outcome = neuralink(
        "bench", made.layout, "--trace", trace, "--real", "--tokens", 8, "--dram", "20%", "--json", "-q"
    )
    assert outcome.code == 0
    document = json.loads(outcome.stdout)
    assert document["real"] is True
    assert isinstance(document["direct"], bool)
    assert {row["way"]["device"] for row in document["rows"]} == {"real"}
    for row in document["rows"]:
        assert row["figures"]["tokens"] == 8
        assert (row["figures"]["io_mean"] > 0) == (row["figures"]["reads"] > 0)


def test_tokens_can_be_chosen(neuralink: Neuralink, made: Made, trace: Path) -> None:
    def tokens(*arguments: object) -> int:
        outcome = neuralink("bench", made.layout, "--trace", trace, "--json", "-q", "--dram", 20000, *arguments)
        return int(sum(part["stop"] - part["start"] for part in json.loads(outcome.stdout)["tokens"]))

    assert tokens() == 120
    assert tokens("--held-out", 0.5) == 120
    assert tokens("--all-tokens") == 600
    assert tokens("--tokens", 17) == 17


def test_what_does_not_go_together(neuralink: Neuralink, made: Made, trace: Path, tmp_path: Path) -> None:
    def fails(code: int, message: str, *arguments: object) -> None:
        outcome = neuralink("bench", *arguments, "-q")
        assert outcome.code == code
        assert message in outcome.error

    common = (made.layout, "--trace", trace)
    fails(2, "--all-tokens and --held-out cannot be combined", *common, "--all-tokens", "--held-out", 0.1)
    fails(2, "cannot be combined with --real", *common, "--real", "--bundle-bytes", 4096)
    fails(2, "is not a bundled layout", made.placement, "--trace", trace, "--real")
    fails(2, "is not a valid size", *common, "--dram", "lots")
    fails(2, "bytes of DRAM are too few", *common, "--dram", "17")
    fails(2, "neither a file nor built in", *common, "--device", "floppy")
    fails(3, "no such directory", tmp_path / "absent", "--trace", trace)
    fails(3, "t.absent", made.layout, "--trace", tmp_path / "t.absent")
    other = write_checkpoint(tmp_path / "other", "opt", seed=9)
    stranger = write_random_trace(other, tmp_path / "other.safetensors")
    fails(5, "pass a trace of the same checkpoint", made.layout, "--trace", stranger)
