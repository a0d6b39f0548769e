"""`neuralink estimate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from tests.checkpoints import write_checkpoint, write_random_trace
from tests.cli.conftest import Neuralink

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its trace and its placement."""
    folder = tmp_path_factory.mktemp("estimate")
    model = write_checkpoint(folder / "model", "opt", hidden=32, config={"hidden_size": 32})
    write_random_trace(model, folder / "trace")
    cluster(folder / "trace", folder / "placement", ClusterOptions(find_device("ufs4.0"), order="linked"))
    return folder


def test_says_sizes_gains_and_speed_on_80_columns(neuralink: Neuralink, folder: Path) -> None:
    outcome = neuralink(
        "estimate", folder / "model", "--placement", folder / "placement", "--trace", folder / "trace", "-q",
        "--tokens-per-second", "2000", "--weights", "q4_0", "--resident", "gate",
    )  # fmt: skip
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and str(folder) not in line] == []
    words = " ".join(outcome.stdout.split())
    assert "2 blocks from layers.0 on: 37 neurons of 18 bytes, 256 in the source" in words
    table = [line.split() for line in lines if line.split("%")[0].isdigit()]
    assert [row[0] for row in table] == ["0%", "5%", "10%", "20%", "30%", "40%", "50%"]
    assert "With 5% of the bundles in DRAM, reading a token takes" in words
    assert "At 2000 tokens/s, storage needs" in words
    assert words.endswith("ufs4.0 is fast enough.")


def test_says_what_is_too_slow(neuralink: Neuralink, folder: Path) -> None:
    outcome = neuralink(
        "estimate", folder / "model", "--trace", folder / "trace", "-q", "--tokens-per-second", "1e6", "--dram", "0%"
    )
    assert "ufs4.0 is too slow by a factor of" in " ".join(outcome.stdout.split())
    assert "made for this estimate with effort fast" in outcome.stdout


def test_the_shape_of_its_json(neuralink: Neuralink, folder: Path) -> None:
    arguments = ("estimate", folder / "model", "--placement", folder / "placement", "--json", "-q")
    replayed = json.loads(neuralink(*arguments, "--trace", folder / "trace", "--dram", "1kB").stdout)
    stated = json.loads(neuralink(*arguments).stdout)
    for document in (replayed, stated):
        assert sorted(document) == [
            "blocks", "budgets", "dense_weights", "device", "effort", "figures", "held_out", "layout", "memory",
            "model", "order", "origin", "placement", "relayout", "resident", "size", "source_bytes", "tokens",
            "tokens_per_second", "weights",
        ]  # fmt: skip
        assert sorted(document["size"]) == ["companions", "own", "total", "weights"]
        assert sorted(document["blocks"][0]) == ["bundle_bytes", "count", "first", "neurons", "source_bytes"]
        assert sorted(document["memory"]) == [
            "dense_bytes", "least_bytes", "pinned_bytes", "resident_bytes", "token_bytes",
        ]  # fmt: skip
        (budget,) = document["budgets"]
        assert sorted(budget) == [
            "dram_bytes", "gain", "gain_over_naive", "hit_rate", "io_seconds", "read_bytes", "reads", "share",
            "speed_needed",
        ]  # fmt: skip
        assert sorted(budget["gain"]) == ["high", "low", "value"]
    assert (replayed["figures"], stated["figures"]) == ("replayed", "stated")
    assert replayed["budgets"][0]["share"] is None
    assert stated["size"]["total"] == replayed["size"]["total"]


def test_says_what_relayout_will_say(neuralink: Neuralink, folder: Path, outputs: Path) -> None:
    arguments = (folder / "model", "--placement", folder / "placement", "--resident", "gate")
    found = json.loads(neuralink("estimate", *arguments, "--json", "--disk-speed", "1kB").stdout)["relayout"]
    planned = json.loads(neuralink("relayout", *arguments, "-o", outputs / "flash", "--dry-run", "--json").stdout)
    expected = planned["estimate"]
    assert (found["bytes_read"], found["bytes_written"]) == (expected["bytes_read"], expected["bytes_written"])
    assert found["least_seconds"] == (found["bytes_read"] + found["bytes_written"]) / 1000
    # The same programs, but what it has taken so far a process never gives back.
    assert 0.9 * expected["memory_bytes"] <= found["memory_bytes"] <= expected["memory_bytes"]
    said = " ".join(neuralink("estimate", *arguments).stdout.split())
    assert "relayout reads " in said
    assert "takes at least" not in said
    refused = neuralink("estimate", *arguments, "--disk-speed", "0")
    assert (refused.code, refused.error) == (2, "--disk-speed is 0; pass bytes a second, like 1GB")


def test_a_placement_alone_says_what_it_knows(neuralink: Neuralink, folder: Path) -> None:
    arguments = ("estimate", folder / "model", "--placement", folder / "placement", "-q")
    words = " ".join(neuralink(*arguments, "--tokens-per-second", "10").stdout.split())
    assert "As `cluster` measured on held-out tokens for ufs4.0, without a cache" in words
    assert "ufs4.0 is fast enough" in words
    assert "The gain is not known" in neuralink(*arguments, "--weights", "q4_0").stdout
    permuted = neuralink(*arguments, "--layout", "permuted").stdout
    assert "an ordinary checkpoint, which is loaded whole" in permuted


def test_options_that_make_no_sense_are_refused(neuralink: Neuralink, folder: Path) -> None:
    model, placement, trace = folder / "model", ("--placement", folder / "placement"), ("--trace", folder / "trace")
    for arguments, message in (
        ((), "there is nothing to estimate from; pass --placement, --trace or both"),
        ((*placement, *trace, "--effort", "max"), "--effort is for the order that is made without --placement"),
        ((*placement, "--dram", "5%"), "--dram is for replaying a trace; pass --trace too"),
        ((*trace, "--layout", "permuted", "--weights", "q4_0"), "--weights needs --layout bundled"),
        ((*placement, "--alignment", "3"), "--alignment 3 is not a power of two"),
    ):
        outcome = neuralink("estimate", model, *arguments, "-q")
        assert outcome.code == 2
        assert message in outcome.error
