from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.activations.trace import Trace, TraceHeader
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import (
    InputError,
    MismatchError,
    MissingDependencyError,
    OptionError,
    OutputError,
    UnsupportedError,
)
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import HIDDEN, NEURONS, TEXT


def read(path: Path) -> tuple[TraceHeader, list[int], list[npt.NDArray[np.uint8]]]:
    with Trace(path) as trace:
        bits = [
            np.unpackbits(trace.fired(block), axis=1, bitorder="little")[:, : block.neurons]
            for block in trace.info.blocks
        ]
        return trace.info, trace.sequence_lengths.tolist(), bits


@pytest.fixture
def request_(model: ModelFactory, text_file: Path, tmp_path: Path) -> ProfileRequest:
    return ProfileRequest(model("opt"), tmp_path / "t.trace.safetensors", (str(text_file),), batch_size=3)


def test_the_trace_says_what_it_is_of(request_: ProfileRequest) -> None:
    summary = profile(request_)
    info, lengths, bits = read(request_.output)
    with Checkpoint(Path(request_.model)) as checkpoint:
        fingerprint = checkpoint.fingerprint
    assert info.model == {"fingerprint": fingerprint, "model_type": "opt", "architecture": "opt"}
    assert info.origin is None
    assert (info.signal, info.calibration) == ("gate", None)
    assert [block.id for block in info.blocks] == ["layers.0", "layers.1"]
    assert info.blocks[0].part_bytes == {"up": HIDDEN * 4, "down": HIDDEN * 4}
    (source,) = info.sources
    assert (source.name, source.first_sequence, source.sequences) == ("river.txt", 0, len(lengths))
    assert source.total_sequences == source.sequences
    assert source.tokens == sum(lengths) == info.tokens == summary.tokens == len(bits[0])
    assert source.parameters == {
        "batch_size": 3,
        "device": "cpu",
        "dtype": "float32",
        "max_seq_length": 64,
        "max_tokens": None,
        "num_samples": None,
        "packing": True,
        "revision": None,
        "seed": None,
        "split": None,
        "text_columns": None,
    }
    assert [block.active_ratio for block in summary.blocks] == [b.mean() for b in bits]
    assert [(s.name, s.tokens) for s in summary.sources] == [("river.txt", info.tokens)]
    with Trace(request_.output) as trace:
        trace.check_content()
        assert trace.content_sha256 == summary.content_sha256


def test_the_same_request_gives_the_same_bytes(request_: ProfileRequest, tmp_path: Path) -> None:
    """In other processes with another hash seed too: `tests/cli/test_torchrun.py` compares with those."""
    first = replace(request_, output=tmp_path / "first")
    profile(first)
    profile(request_)
    assert first.output.read_bytes() == request_.output.read_bytes()


def test_the_dtype_of_the_checkpoint_is_taken_when_asked_for(request_: ProfileRequest) -> None:
    profile(replace(request_, dtype="bfloat16"))
    assert read(request_.output)[0].sources[0].parameters["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_padding_and_nothing_else_is_left_out(
    model: ModelFactory, family: str, request_: ProfileRequest, tmp_path: Path
) -> None:
    ratio = None if family == "opt" else 0.3
    padded = replace(request_, model=model(family), active_ratio=ratio, packing=False, batch_size=4)
    profile(padded)
    info, lengths, bits = read(padded.output)
    assert len(set(lengths[:4])) > 1, "the first batch was to need padding"
    alone = replace(padded, output=tmp_path / "alone", batch_size=1, active_ratio=None, thresholds_from=padded.output)
    profile(alone)
    info_alone, lengths_alone, bits_alone = read(alone.output)
    assert lengths == lengths_alone
    assert info.sources[0].sha256 == info_alone.sources[0].sha256
    assert len(bits[0]) == sum(lengths)
    for a, b in zip(bits, bits_alone, strict=True):
        # Sums in another order may decide a signal on its threshold otherwise.
        assert (a != b).mean() < 1e-3


def test_packing_is_the_default_for_language_models_only(
    model: ModelFactory, request_: ProfileRequest, tmp_path: Path
) -> None:
    profile(request_)
    profile(replace(request_, model=model("bert"), output=tmp_path / "bert", active_ratio=0.3))
    assert set(read(request_.output)[1][:-1]) == {64}
    assert len(read(tmp_path / "bert")[1]) == sum(1 for line in TEXT.split("\n") if line)


def test_roberta_runs_to_its_last_position(model: ModelFactory, request_: ProfileRequest) -> None:
    long = replace(request_, model=model("roberta"), active_ratio=0.3, packing=True, max_seq_length=1000)
    profile(long)
    assert max(read(long.output)[1]) == 64


def test_several_datasets_keep_their_tokens_apart(
    model: ModelFactory, request_: ProfileRequest, tmp_path: Path
) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi there"}]}) + "\n")
    (tmp_path / "rows.csv").write_text("text,n\nthe river runs,1\nand runs,2\n")
    datasets = (request_.datasets[0], str(tmp_path / "chat.jsonl"), str(tmp_path / "rows.csv"))
    request_ = replace(request_, model=model("qwen2"), datasets=datasets, active_ratio=0.3, max_tokens=100)
    profile(request_)
    info, lengths, _ = read(request_.output)
    assert [source.name for source in info.sources] == ["river.txt", "chat.jsonl", "rows.csv"]
    assert lengths[:2] == [64, 36]
    assert info.sources[0].tokens == 100
    assert [source.parameters["text_columns"] for source in info.sources] == [None, ["messages"], ["text"]]
    assert sum(lengths) == info.tokens


def test_thresholds_are_calibrated_over_all_datasets(
    model: ModelFactory, request_: ProfileRequest, tmp_path: Path
) -> None:
    # Two texts on which a model is not equally active: an order of tokens each, one of them much longer.
    (tmp_path / "digits.txt").write_text("0 1 2 3 4 5 6 7 8 9\n" * 120)
    (tmp_path / "river.txt").write_text(TEXT)
    datasets = (str(tmp_path / "digits.txt"), str(tmp_path / "river.txt"))
    request_ = replace(request_, model=model("llama"), datasets=datasets, active_ratio=0.1, max_seq_length=16)
    found = {}
    for order in (datasets, datasets[::-1]):
        summary = profile(replace(request_, datasets=order, calibration_tokens=1024, overwrite=True))
        assert summary.calibration is not None
        assert summary.calibration["tokens"] < 1024 + 2 * 16
        shares = {source.name: source.active_ratio or 0.0 for source in summary.sources}
        tokens = {source.name: source.tokens for source in summary.sources}
        whole = sum(shares[name] * tokens[name] for name in shares) / summary.tokens
        assert whole == pytest.approx(0.1, abs=0.012)
        assert whole == pytest.approx(sum(block.active_ratio for block in summary.blocks) / len(summary.blocks))
        found[order] = [block.threshold for block in summary.blocks], shares
    assert found[datasets] == found[datasets[::-1]]


def test_the_active_ratio_is_met_and_the_calibration_recorded(model: ModelFactory, request_: ProfileRequest) -> None:
    request_ = replace(request_, model=model("llama"), active_ratio=0.2, calibration_tokens=100, batch_size=1)
    summary = profile(request_)
    info, _, _ = read(request_.output)
    # Whole sequences, spread over the data.
    assert info.calibration == summary.calibration == {"active_ratio": 0.2, "tokens": 128}
    for block in info.blocks:
        assert block.threshold == np.float32(block.threshold) > 0
    assert [block.active_ratio for block in summary.blocks] == pytest.approx([0.2, 0.2], abs=0.04)
    assert summary.blocks[0].active_ratio != summary.blocks[1].active_ratio


def test_thresholds_are_taken_over_exactly(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    first = replace(request_, model=model("llama"), active_ratio=0.2, max_tokens=128)
    profile(first)
    second = replace(first, output=tmp_path / "second", active_ratio=None, thresholds_from=first.output)
    profile(second)
    assert second.output.read_bytes() == first.output.read_bytes()
    with pytest.raises(MismatchError, match="signal 'gate', not 'intermediate'"):
        profile(replace(second, output=tmp_path / "third", signal="intermediate"))
    with pytest.raises(MismatchError, match=r"was not made with the model"):
        profile(replace(second, output=tmp_path / "third", model=model("llama", seed=1)))
    with pytest.raises(InputError, match="is not a trace file"):
        profile(replace(second, output=tmp_path / "third", thresholds_from=model("llama") / "model.safetensors"))


def test_an_active_ratio_also_holds_for_relu(request_: ProfileRequest) -> None:
    summary = profile(replace(request_, active_ratio=0.1))
    assert [block.active_ratio for block in summary.blocks] == pytest.approx([0.1, 0.1], abs=0.01)


def test_an_architecture_from_a_file(request_: ProfileRequest, tmp_path: Path) -> None:
    built_in = resources.files("neuralink_cli.architectures").joinpath("descriptions/opt.json").read_text()
    document = json.loads(built_in) | {"name": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    profile(replace(request_, architecture_file=tmp_path / "mine.json"))
    assert read(request_.output)[0].model["architecture"] == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": ()}, "--dataset"),
        ({"signal": "up"}, "signal 'up'"),
        ({"active_ratio": 1.0}, "--active-ratio 1.0 is not between"),
        ({"active_ratio": 0.3, "thresholds_from": Path("x")}, "both decide"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_seq_length": -1}, "--max-seq-length -1"),
        ({"part": (0, 2)}, "--part 0/2"),
        ({"part": (3, 2)}, "--part 3/2"),
        ({"part": (1, 100)}, "--part 1/100 has no batches: there are only 3"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_options_that_make_no_sense(request_: ProfileRequest, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        profile(replace(request_, **change))
    assert list(request_.output.parent.iterdir()) == []


def test_an_output_that_exists_is_kept(request_: ProfileRequest) -> None:
    request_.output.write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        profile(request_)
    assert request_.output.read_text() == "mine"
    profile(replace(request_, overwrite=True))
    assert read(request_.output)


def test_a_disk_that_is_too_small_is_found_out_before_the_model_runs(
    request_: ProfileRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="bytes of disk"):
        profile(request_)


def test_the_disk_must_hold_the_bits_twice(request_: ProfileRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[tuple[Path, int]] = []
    monkeypatch.setattr(
        "neuralink_cli.profiling.recording.require_space", lambda path, size: needs.append((path, size))
    )
    summary = profile(request_)
    row_bytes = sum(-(-block.neurons // 8) for block in summary.blocks)
    assert needs == [(request_.output, 2 * summary.tokens * row_bytes)]


@pytest.mark.parametrize("stage", ["loading the model", "tokenizing", "recording", "writing"])
def test_an_interrupted_run_leaves_nothing(request_: ProfileRequest, stage: str) -> None:
    stages = []

    @contextmanager
    def progress(name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        stages.append(name)

        def advance(_amount: int) -> None:
            if name == stage:
                raise KeyboardInterrupt

        yield advance
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(request_, progress)
    assert stages[-1] == stage
    assert list(request_.output.parent.iterdir()) == []


def test_progress_adds_up(model: ModelFactory, request_: ProfileRequest) -> None:
    done: dict[str, int] = {}
    totals = {}

    @contextmanager
    def progress(name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        totals[name], done[name] = total, 0

        def advance(amount: int) -> None:
            done[name] += amount

        yield advance

    summary = profile(replace(request_, model=model("llama"), active_ratio=0.3), progress)
    written = summary.tokens * 2 * -(-NEURONS["llama"] // 8) + (4 + 4 + 16) * summary.sources[0].sequences
    assert done["tokenizing"] == done["recording"] == totals["recording"] == summary.tokens
    assert done["calibrating thresholds"] == totals["calibrating thresholds"] == summary.tokens
    assert done["writing"] == totals["writing"] == written


def test_nan_weights_stop_the_run(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = copy_model(model("opt"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.decoder.layers.1.fc1.weight"][5, 3] = np.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"block 'layers\.1' is not a number"):
        profile(replace(request_, model=broken))
    assert not request_.output.exists()


@pytest.mark.parametrize(
    "lost", ["model.decoder.layers.1.self_attn.q_proj.weight", "model.decoder.embed_tokens.weight"]
)
def test_missing_weights_are_not_made_up(
    model: ModelFactory, request_: ProfileRequest, tmp_path: Path, lost: str
) -> None:
    from safetensors.numpy import load_file, save_file

    broken = copy_model(model("opt"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors[lost]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is missing, so the model would run on random numbers"):
        profile(replace(request_, model=broken))


def test_a_model_without_a_tokenizer(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    bare = copy_model(model("opt"), tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer|cannot load its tokenizer"):
        profile(replace(request_, model=bare))


def test_a_tokenizer_of_another_model(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    mixed = copy_model(model("opt"), tmp_path / "mixed")
    text = (mixed / "tokenizer.json").read_text()
    document = json.loads(text)
    shift = {token: index + 1000 if index > 50 else index for token, index in document["model"]["vocab"].items()}
    document["model"]["vocab"] = shift
    (mixed / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"the tokenizer turns it into token 1\d\d\d, but the model has only 320"):
        profile(replace(request_, model=mixed))


def test_code_in_a_checkpoint_is_not_run(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    remote = copy_model(model("opt"), tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "code.Mine", "AutoConfig": "code.MyConfig"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text("raise SystemExit('this must not run')")
    built_in = resources.files("neuralink_cli.architectures").joinpath("descriptions/opt.json")
    with pytest.raises(UnsupportedError, match="architecture 'mine' is not known"):
        profile(replace(request_, model=remote))
    with pytest.raises(UnsupportedError, match="pass --trust-remote-code"):
        profile(replace(request_, model=remote, architecture_file=Path(str(built_in))))


def test_without_torch_the_extra_is_named(request_: ProfileRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"torch.*pip install 'neuralink-cli\[hf\]'"):
        profile(request_)


def test_torch_is_not_imported_before_it_is_needed() -> None:
    modules = (
        *(f"activations.{name}" for name in ("trace", "merge", "options", "threshold", "spool")),
        *("calibration.sources", "evaluation.output_comparison", "profiling.profile"),
    )
    imports = "; ".join(f"import neuralink_cli.{module}" for module in modules)
    check = "import sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True)


def copy_model(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
