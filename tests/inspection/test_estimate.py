"""What `estimate` says of a layout is what the layout then is: its size to the byte, its gain to the last digit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.bench.bench import BenchOptions, bench_layouts
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from neuralink_cli.errors import MismatchError, OptionError, OutputError
from neuralink_cli.inspection.estimate import estimate
from neuralink_cli.inspection.estimate_report import EstimateOptions, EstimateReport
from neuralink_cli.inspection.facts import read_facts
from neuralink_cli.inspection.kinds import recognise
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.placement.placement import Placement
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import NO_CACHE
from tests.checkpoints import RawTensor, files_of, tensors_of, write_checkpoint, write_random_trace
from tests.faults import file_size_limit
from tests.layouts import relayout

DEVICE = find_device("ufs4.0")
SHARES = (0.0, 0.2)
BUDGETS = tuple(DramBudget(fraction=share) for share in SHARES)


def write_model(directory: Path, family: str = "opt", *, shards: int = 1, **options: Any) -> Path:
    """A checkpoint with rows that weight formats take, and weights that can be rounded."""
    tensors = tensors_of(family, hidden=32, **options)
    random = np.random.default_rng(options.get("seed", 0))
    for name, tensor in tensors.items():
        if tensor.dtype == "F32":
            numbers = random.standard_normal(tensor.shape, dtype=np.float32)
            tensors[name] = RawTensor("F32", tensor.shape, numbers.tobytes())
    return write_checkpoint(directory, family, tensors=tensors, config={"hidden_size": 32}, shards=shards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with traces and placements, by family."""
    folder = tmp_path_factory.mktemp("estimate")
    for family, shards in (("opt", 1), ("llama", 2)):
        model = write_model(folder / family / "model", family, shards=shards)
        write_random_trace(model, folder / family / "trace")
        options = ClusterOptions(DEVICE, order="linked", pin_hot=0.1)
        cluster(folder / family / "trace", folder / family / "placement", options)
    return folder


LAYOUTS: dict[str, dict[str, Any]] = {
    "source": {},
    "q4_0": {"weights": "q4_0"},
    "gate": {"resident": "gate", "alignment": 512},
    "q4_0 and gate": {"weights": "q4_0", "resident": "gate", "dense_weights": "source"},
    "search": {"weights": "q8_0", "rounding": "search"},
    "permuted": {"layout": "permuted"},
}


def estimated(folder: Path, *, trace: bool = True, placement: bool = True, **options: Any) -> EstimateReport:
    asked = EstimateOptions(layout=RelayoutOptions(**options), budgets=BUDGETS)
    return estimate(
        folder / "model",
        placement=folder / "placement" if placement else None,
        trace=folder / "trace" if trace else None,
        options=asked,
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_sizes_and_gains_are_those_of_the_layout(folder: Path, tmp_path: Path, family: str, name: str) -> None:
    options = LAYOUTS[name]
    here = folder / family
    report = estimated(here, **options)
    relayout(here / "model", here / "placement", tmp_path / "flash", **options)
    assert report.size.total == sum(map(len, files_of(tmp_path / "flash").values()))
    weights = [path.stat().st_size for path in (tmp_path / "flash").glob("*.safetensors")]
    assert report.size.weights == sum(weights)
    facts = read_facts(recognise(tmp_path / "flash"))
    if name != "permuted":
        assert {group.bundle_bytes for group in report.blocks} == {block.bundle_bytes for block in facts.blocks}
        memory = report.memory
        assert facts.dram_bytes == {
            "dense": memory.dense_bytes,
            "resident": memory.resident_bytes,
            "pinned": memory.pinned_bytes,
        }
        assert memory.least_bytes >= memory.dense_bytes + memory.resident_bytes + memory.pinned_bytes
    for budget, needs in zip(BUDGETS, report.budgets, strict=True):
        rows = bench_layouts([tmp_path / "flash"], here / "trace", BenchOptions(dram=budget)).rows
        (row,) = [
            row
            for row in rows
            if row.way.layout is not None and row.way.collapse and (row.way.cache == NO_CACHE) == (not budget.fraction)
        ]
        assert (needs.gain, needs.gain_over_naive) == (row.gain, row.gain_over_naive)
        assert (needs.io_seconds, needs.reads) == (row.figures.io_mean, row.figures.reads)
        assert (needs.hit_rate, needs.read_bytes) == (row.figures.hit_rate, row.figures.bytes_read)
        assert needs.dram_bytes == row.dram_bytes


def test_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", seed=99)
    here = folder / "opt"
    # Of the same names and shapes, but with other weights, so with another fingerprint.
    other = estimate(
        model, placement=here / "placement", trace=here / "trace", options=EstimateOptions(budgets=BUDGETS)
    )
    mine = estimated(here)
    assert {**other.as_document(), "model": ""} == {**mine.as_document(), "model": ""}


def test_an_order_made_for_the_estimate_is_that_of_cluster(folder: Path, tmp_path: Path) -> None:
    here = folder / "opt"
    report = estimated(here, placement=False, weights="q4_0", resident="gate")
    options = ClusterOptions(DEVICE, weights="q4_0", resident="gate", effort="fast")
    cluster(here / "trace", tmp_path / "placement", options)
    asked = EstimateOptions(layout=RelayoutOptions(weights="q4_0", resident="gate"), budgets=BUDGETS)
    same = estimate(here / "model", placement=tmp_path / "placement", trace=here / "trace", options=asked)
    assert (report.budgets, report.size, report.memory) == (same.budgets, same.size, same.memory)
    assert (report.placement, report.effort) == (None, "fast")
    assert (same.placement, same.effort) == (str(tmp_path / "placement"), None)


def test_the_order_that_is_thrown_away_leaves_nothing_even_if_the_run_is_killed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here, found = folder / "opt", {}

    @contextlib.contextmanager
    def watched(stage: str, *_: object) -> Iterator[Callable[[int], object]]:
        found[stage] = list(tmp_path.iterdir())
        yield lambda _: None

    options = EstimateOptions(budgets=BUDGETS)
    report = estimate(here / "model", trace=here / "trace", options=options, progress=watched)
    assert report.figures == "replayed"
    assert found == {"cluster": [], "replay": []}
    assert not any(tmp_path.iterdir())


def test_a_full_folder_for_temporary_files_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = folder / "opt"
    with file_size_limit(100), pytest.raises(OutputError) as caught:
        estimate(here / "model", trace=here / "trace", options=EstimateOptions(budgets=BUDGETS))
    assert caught.value.where == str(tmp_path)
    assert "set TMPDIR to another folder" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_placement_alone_states_its_own_gain(folder: Path) -> None:
    here = folder / "opt"
    report = estimated(here, trace=False)
    with Placement(here / "placement") as placement:
        (stated,) = [gain for gain in placement.info.gains if gain.source is None and gain.order == "stored"]
    (only,) = report.budgets
    assert (report.figures, report.tokens) == ("stated", None)
    assert (only.gain, only.gain_over_naive) == (stated.gain, stated.gain_over_naive)
    assert (only.reads, only.hit_rate) == (None, None)
    # Of other bundles, or another device, it says nothing.
    assert estimated(here, trace=False, weights="q4_0").figures is None
    elsewhere = EstimateOptions(device=find_device("nvme"))
    assert estimate(here / "model", placement=here / "placement", options=elsewhere).budgets == ()


def test_the_stated_time_is_near_the_replayed_one(folder: Path) -> None:
    here = folder / "opt"
    (stated,) = estimated(here, trace=False).budgets
    replayed = estimated(here).budgets[0]
    # Replayed without any DRAM, so that pinned neurons are read too.
    assert 0.5 * replayed.io_seconds < stated.io_seconds <= replayed.io_seconds


def test_the_speed_that_is_needed_is_the_share_of_time_that_reading_takes(folder: Path) -> None:
    here = folder / "opt"
    options = EstimateOptions(budgets=BUDGETS, tokens_per_second=50.0)
    report = estimate(here / "model", placement=here / "placement", trace=here / "trace", options=options)
    assert [needs.speed_needed for needs in report.budgets] == [50.0 * needs.io_seconds for needs in report.budgets]
    twice = EstimateOptions(budgets=BUDGETS, tokens_per_second=50.0, tokens=60)
    fewer = estimate(here / "model", placement=here / "placement", trace=here / "trace", options=twice)
    assert fewer.tokens is not None
    assert report.tokens is not None
    assert fewer.tokens < report.tokens == report.held_out == fewer.held_out


def test_what_does_not_belong_together_is_told_before_an_order_is_made(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to estimate from"):
        estimate(folder / "opt/model")
    with pytest.raises(MismatchError, match="is of a model of type llama"):
        estimate(folder / "opt/model", trace=folder / "llama/trace")
    with pytest.raises(MismatchError, match="is of a model of type llama"):
        estimate(folder / "opt/model", placement=folder / "llama/placement")
    smaller = write_model(tmp_path / "model", neurons=36)
    with pytest.raises(MismatchError, match="does not fit the checkpoint's blocks"):
        estimate(smaller, trace=folder / "opt/trace")
    with pytest.raises(MismatchError, match="does not fit the checkpoint's blocks"):
        estimate(smaller, placement=folder / "opt/placement")
    write_random_trace(write_checkpoint(tmp_path / "seed", "opt", seed=5), tmp_path / "trace")
    with pytest.raises(MismatchError, match="but the trace"):
        estimate(folder / "opt/model", placement=folder / "opt/placement", trace=tmp_path / "trace")
