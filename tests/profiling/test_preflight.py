from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from neuralink_cli.activations.options import ProfileOptions
from neuralink_cli.activations.threshold import HISTOGRAM_BYTES
from neuralink_cli.architectures.blocks import BlockPart, FFNBlock
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.loaded_size import expert_tensors, mapped_bytes
from neuralink_cli.files.free_memory import resident_bytes
from neuralink_cli.inspection.inspect import inspect
from neuralink_cli.models.execution import ExecutionOptions
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import load_model
from neuralink_cli.profiling import preflight
from neuralink_cli.profiling.preflight import activation_bytes, tell_needs, telling_time
from neuralink_cli.profiling.ranks import Ranks
from neuralink_cli.profiling.subject import read_subject
from neuralink_cli.sizes import human_bytes
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile
from tests.scaled import FP8, MXFP4, mxfp4_gpt_oss, quantised_copy
from tests.tiny_models import LAYERS, NEURONS

EXAMPLE = Path(__file__).parent.parent.parent / "examples/tiny-relu"


@pytest.fixture
def remarks(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "neuralink_cli")
    return lambda: [record.message for record in caplog.records]


def test_needs_are_told_before_the_model_is_loaded(
    model: ModelFactory, text_file: Path, tmp_path: Path, remarks: Callable[[], list[str]]
) -> None:
    stages: list[tuple[str, list[str]]] = []

    def progress(name: str, _total: int | None, _unit: str) -> NoReturn:
        stages.append((name, list(remarks())))
        raise KeyboardInterrupt

    request = ProfileRequest(model("opt"), tmp_path / "t", (str(text_file),), max_tokens=1000)
    with pytest.raises(KeyboardInterrupt):
        profile(request, progress)
    ((name, (told,)),) = stages
    assert name == "loading the model"
    bytes_per_token = 2 * LAYERS * -(-NEURONS["opt"] // 8)
    assert told.endswith(f"at most {bytes_per_token:.1f} kB of disk")
    found = re.search(r"about (.*) ([MG]B) of memory \((.*) kB of weights, (.*) MB of activations, the rest", told)
    assert found is not None
    total, weights, activations = (float(found[part]) for part in (1, 3, 4))
    # In GB it says one digit after the point.
    total, rounded = (1000 * total, 50) if found[2] == "GB" else (total, 0)
    # What the test's own process takes, with all that is imported, what was asked for, and what running it loads.
    most = (resident_bytes() + preflight._FIRST_RUN_BYTES) / 1e6 + 10
    assert 1.06 * (100 + weights / 1000 + activations) < total < 1.06 * most + rounded
    with pytest.raises(KeyboardInterrupt):
        profile(replace(request, max_memory=1000, dtype="bfloat16", max_tokens=None), progress)
    assert "(1.0 kB of weights" in remarks()[-1]
    assert f"{bytes_per_token:.1f} MB of disk per million tokens" in remarks()[-1]


def ffn_block(neurons: int, hidden: int) -> FFNBlock:
    return FFNBlock("layers.0", neurons, hidden, "relu", (BlockPart("up", "up.weight", 0, "F32", None),))


def test_a_batch_holds_the_values_of_the_widest_layer_for_all_its_tokens() -> None:
    data = CalibrationOptions(("x",), batch_size=3, max_seq_length=100)
    blocks = [ffn_block(50, 10), ffn_block(40, 30), ffn_block(60, 5)]
    # Four of each neuron, six of each hidden value: 340 of the second block.
    assert activation_bytes(data, blocks, 2) == 3 * 100 * 340 * 2
    assert activation_bytes(replace(data, max_seq_length=None), blocks, 4) == 3 * 512 * 340 * 4


@pytest.mark.parametrize(
    ("datasets", "max_tokens", "part", "disk"),
    [
        (1, 1000, None, "at most 12.0 kB of disk"),
        (3, 1000, None, "at most 36.0 kB of disk"),
        (3, 1000, (1, 2), "at most 18.0 kB of disk"),
        (1, None, None, "12.0 MB of disk per million tokens"),
    ],
)
@pytest.mark.parametrize(("limit", "weights"), [(None, 5_000_000), (2_000_000, 2_000_000), (6_000_000, 5_000_000)])
@pytest.mark.parametrize("mapped", [0, 1_000_000, 4_000_000])
def test_memory_is_that_of_weights_and_activations_or_files_and_disk_that_of_bits_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remarks: Callable[[], list[str]],
    datasets: int,
    max_tokens: int | None,
    part: tuple[int, int] | None,
    disk: str,
    limit: int | None,
    weights: int,
    mapped: int,
) -> None:
    monkeypatch.setattr(preflight, "_weights", lambda *_: (5_000_000, mapped))
    monkeypatch.setattr(preflight, "resident_bytes", lambda: 0)
    data = CalibrationOptions(("x",) * datasets, max_tokens=max_tokens, max_seq_length=100)
    execution = ExecutionOptions(device="cpu", dtype="bfloat16", max_memory=limit)
    tell_needs(data, execution, part, tmp_path, [ffn_block(8, 250), ffn_block(40, 250)])
    activations = 8 * 100 * (4 * 40 + 6 * 250) * 2
    files = f"{human_bytes(mapped)} of files while they are loaded, " if mapped else ""
    most = round(1.06 * (preflight._FIRST_RUN_BYTES + weights + max(mapped, activations)))
    assert remarks() == [
        f"takes about {human_bytes(most)} of memory ({human_bytes(weights)} of weights, {files}"
        f"{human_bytes(activations)} of activations, the rest for programs) and {disk}"
    ]


def test_experts_have_histograms_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remarks: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(preflight, "_weights", lambda *_: (5_000_000, 0))
    data = CalibrationOptions(("x",), max_tokens=1000, max_seq_length=1, batch_size=1)
    blocks = [replace(ffn_block(8, 250), id=f"layers.0.experts.{k}") for k in range(1000)]
    execution = ExecutionOptions(device="cpu", dtype="bfloat16")
    for calibrated, histograms in ((True, 1000 * HISTOGRAM_BYTES), (False, 0)):
        tell_needs(data, execution, None, tmp_path, blocks, calibrated=calibrated)
        assert f", {human_bytes(histograms + 2 * (4 * 8 + 6 * 250))} of activations" in remarks()[-1]


@pytest.mark.parametrize("kind", ["bfloat16", FP8, MXFP4])
def test_inspect_tells_the_weights_that_profile_tells_and_holds(model: ModelFactory, tmp_path: Path, kind: str) -> None:
    directory = EXAMPLE if kind == FP8 else model("llama", dtype="bfloat16")
    if kind == MXFP4:
        _, directory, _ = mxfp4_gpt_oss(tmp_path)
    elif kind == FP8:
        quantised_copy(directory, tmp_path / "model", FP8)
        directory = tmp_path / "model"
    subject = read_subject(directory, ProfileOptions())
    parts = preflight._memory_parts(
        CalibrationOptions(("x",)), ExecutionOptions(), directory, subject.blocks, calibrated=False
    )
    need, weights = inspect(directory).needs[0], parts.weights
    assert (need.stage, need.bytes) == ("profile", weights)
    # All that is stored in another dtype is in memory until it is loaded: not headers, heads and scales of float32.
    whole = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert {"bfloat16": 0.6, FP8: 0.95, MXFP4: 0.7}[kind] * whole < parts.mapped < whole
    if kind == "bfloat16":
        assert parts.mapped == weights / 2
    with quiet_transformers():
        loaded = load_model(directory, subject.architecture, device="cpu")
    held = sum(tensor.nbytes for tensor in loaded.parameters())
    # The scales of quantised weights come on top.
    assert held <= weights <= 1.05 * held


class Four(Ranks):
    count = 4
    here = range(2)


def test_ranks_are_told_what_each_takes_and_all_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remarks: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(preflight, "_weights", lambda *_: (5_000_000, 0))
    monkeypatch.setattr(preflight, "resident_bytes", lambda: 0)
    data = CalibrationOptions(("x",), max_tokens=1000, max_seq_length=1, batch_size=1)
    execution = ExecutionOptions(device="cpu", dtype="bfloat16")
    tell_needs(data, execution, None, tmp_path, [ffn_block(8, 250), ffn_block(40, 250)], Four())
    assert remarks() == [
        "each of 4 ranks takes about 49.8 MB of memory (5.0 MB of weights, 3.3 kB of activations, the rest for "
        "programs), together 99.5 MB on this machine and at most 12.0 kB of disk"
    ]


def test_the_time_left_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch, remarks: Callable[[], list[str]]) -> None:
    now = 0.0
    monkeypatch.setattr(preflight, "monotonic", lambda: now)
    advance = telling_time(lambda _count: None, 2800, 4)
    for _ in range(2):
        now += 100
        advance(100)
    assert remarks() == ["recording the other 2,000 tokens takes about 8 min"]


def told_after(seconds_of_batches: list[float], total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(preflight, "monotonic", lambda: now)
    counts: list[int] = []
    advance = telling_time(counts.append, total)
    for seconds in seconds_of_batches:
        now += seconds
        advance(100)
    assert counts == [100] * len(seconds_of_batches)


@pytest.mark.parametrize(
    ("batches", "total", "expected"),
    [
        # The first batch warms up and does not count.
        ([500.0, 3.0, 9.0], 10_200, ["recording the other 10,000 tokens takes about 5 min"]),
        ([0.0, 60.0, 60.0], 10_200, ["recording the other 10,000 tokens takes about 1.7 h"]),
        ([9.0, 1.0], 1_200, []),
        ([9.0, 6.0], 1_200, ["recording the other 1,000 tokens takes about 60 s"]),
        ([9.0, 5.75], 1_200, []),
        ([900.0], 1_200, []),
        ([900.0, 900.0], 200, []),
    ],
)
def test_the_time_is_told_once_if_it_is_long(
    batches: list[float],
    total: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    remarks: Callable[[], list[str]],
) -> None:
    told_after(batches, total, monkeypatch)
    assert remarks() == expected


def test_tensors_of_single_experts_are_in_memory_twice_while_they_are_put_together(model: ModelFactory) -> None:
    with Checkpoint(model("mixtral")) as checkpoint:
        of_experts = [place.entry for name, place in checkpoint.tensors.items() if ".experts." in name]
        assert expert_tensors(checkpoint) == len(of_experts) > 0
        assert mapped_bytes(checkpoint, "float32") == sum(entry.nbytes for entry in of_experts)
    with Checkpoint(model("llama")) as checkpoint:
        assert (expert_tensors(checkpoint), mapped_bytes(checkpoint, "float32")) == (0, 0)
