from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.calibration.batches import text_batch
from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.errors import InputError, OptionError, UnsupportedError
from neuralink_cli.evaluation.output_comparison import compare_outputs
from neuralink_cli.models import offload
from neuralink_cli.models.loading import load_model
from neuralink_cli.models.offload import MemoryLimit, input_device, weight_bytes
from tests.conftest import ModelFactory
from tests.families import FAMILY
from tests.profile_requests import ProfileRequest, profile
from tests.scaled import INT8, PACKED4, quantised_copy
from tests.tiny_models import PLAIN, TEXT

# They take the weights of their relative positions without running the module that holds them.
NOT_OFFLOADED = ["deberta", "deberta-v2"]


# Of what is stored, and what it is computed in: each with a third of the families.
DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")]


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [(name, *DTYPES[k % 3]) for k, name in enumerate(n for n in PLAIN if n not in NOT_OFFLOADED)],
)
def test_traces_do_not_depend_on_the_memory(
    model: ModelFactory,
    family: str,
    stored: str,
    dtype: str,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether all of the weights are read for every batch, or about half of them stay."""
    directory = model(family, dtype=stored, shards=True)
    ratio = None if FAMILY[family].exact else 0.3
    request = ProfileRequest(directory, tmp_path / "whole", (str(text_file),), "gate", ratio, batch_size=3, dtype=dtype)
    profile(request)
    assert "do not fit in memory" not in caplog.text
    for limit in (1, int(0.55 * weight_bytes(directory, dtype))):
        caplog.clear()
        profile(replace(request, output=tmp_path / "limited", max_memory=limit, overwrite=True))
        assert "do not fit in memory" in caplog.text
        assert (tmp_path / "limited").read_bytes() == (tmp_path / "whole").read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "limited"}


@pytest.mark.parametrize("family", NOT_OFFLOADED)
def test_models_that_cannot_be_offloaded(model: ModelFactory, family: str, text_file: Path, tmp_path: Path) -> None:
    request = ProfileRequest(model(family), tmp_path / "t", (str(text_file),), active_ratio=0.3, max_memory=1)
    with pytest.raises(UnsupportedError, match=r"without running their module.*--max-memory"):
        profile(request)


def test_a_limit_that_is_enough_changes_nothing(
    model: ModelFactory, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = ProfileRequest(model("opt"), tmp_path / "t", (str(text_file),), max_memory=10**9)
    profile(request)
    assert "do not fit in memory" not in caplog.text


def test_without_an_option_the_free_memory_decides(
    model: ModelFactory,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "available_memory", lambda: 30_000)
    profile(ProfileRequest(model("opt"), tmp_path / "t", (str(text_file),)))
    assert "of weights do not fit in memory" in caplog.text


def test_what_weights_take(model: ModelFactory) -> None:
    own = weight_bytes(model("opt", dtype="bfloat16"), "auto")
    assert weight_bytes(model("opt", dtype="bfloat16"), "float32") == 2 * own
    assert weight_bytes(model("opt", dtype="bfloat16"), "float16") == own
    assert weight_bytes(model("opt"), "auto") == 2 * own


@pytest.mark.parametrize("kind", [INT8, PACKED4])
def test_what_quantised_weights_take_once_they_are_numbers(tmp_path: Path, kind: str) -> None:
    source = Path(__file__).parent.parent.parent / "examples/tiny-relu"
    quantised_copy(source, tmp_path / "model", kind)
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("auto", 2)):
        plain = weight_bytes(source, "bfloat16" if dtype == "auto" else dtype)
        # The scales, one for each row, and the shapes come on top.
        assert plain < weight_bytes(tmp_path / "model", dtype) < plain + 24 * 1000 * size


@pytest.mark.parametrize(("device", "memory"), [("cpu", 0), ("meta", 10**6)])
def test_limits_that_make_no_sense(model: ModelFactory, device: str, memory: int) -> None:
    directory = model("opt")
    architecture = find_architecture("opt", directory)
    with pytest.raises(OptionError, match="--max-memory"):
        load_model(directory, architecture, device=device, limit=MemoryLimit(memory))


@pytest.mark.parametrize("stage", ["loading the model", "recording"])
def test_an_interrupted_run_leaves_no_weights_behind(
    model: ModelFactory, text_file: Path, tmp_path: Path, stage: str
) -> None:
    directory, output = model("mixtral"), tmp_path / "t"
    seen: list[str] = []

    @contextmanager
    def progress(name: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], None]]:
        yield lambda _amount: None
        if name == stage:
            seen.extend(path.name for path in output.parent.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(ProfileRequest(directory, output, (str(text_file),), active_ratio=0.3, max_memory=1), progress)
    # transformers rearranges experts as it loads them, so they are not read from the checkpoint.
    assert ".t.weights" in seen
    assert list(output.parent.iterdir()) == []


def test_missing_weights_are_not_made_up(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory = tmp_path / "broken"
    directory.mkdir()
    for path in model("opt").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.decoder.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is missing, so the model would run on random numbers"):
        profile(ProfileRequest(directory, tmp_path / "t", (str(text_file),), max_memory=1))


@pytest.mark.parametrize("family", ["mixtral", "mixtral-fused"])
def test_experts(
    model: ModelFactory, family: str, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = ProfileRequest(model(family), tmp_path / "whole", (str(text_file),), active_ratio=0.3)
    profile(request)
    profile(replace(request, output=tmp_path / "limited", max_memory=1))
    assert "do not fit in memory" in caplog.text
    assert (tmp_path / "limited").read_bytes() == (tmp_path / "whole").read_bytes()


def test_inputs_go_where_the_model_computes(model: ModelFactory) -> None:
    directory = model("opt")
    architecture = find_architecture("opt", directory)
    away = load_model(directory, architecture, device="cpu", limit=MemoryLimit(1))
    assert away.device.type == "meta"
    assert input_device(away) == input_device(load_model(directory, architecture, device="cpu")) == torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_outputs_are_compared_whatever_the_memory(
    model: ModelFactory, family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = model(family)
    architecture = find_architecture(family, directory)
    ids = read_token_sequences(directory, TEXT, sequences=1)[0][None]
    batches = [text_batch(ids.astype(np.int64), np.ones(ids.shape, dtype=bool))]
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(offload, "available_memory", lambda: 1000)
        comparison = compare_outputs(directory, directory, batches, architecture)
    assert "do not fit in memory" in caplog.text
    assert comparison.max_abs_difference == 0


def test_outputs_of_a_model_that_cannot_be_offloaded_are_not_compared_and_it_says_why(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model("deberta")
    batches = [text_batch(np.arange(3, 40)[None], np.ones((1, 37), dtype=bool))]
    monkeypatch.setattr(offload, "available_memory", lambda: 1000)
    with pytest.raises(UnsupportedError, match="offloaded weights without running their module"):
        compare_outputs(directory, directory, batches, find_architecture("deberta", directory))
