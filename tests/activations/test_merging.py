from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.activations.merge import merge_traces
from neuralink_cli.activations.trace import Trace
from neuralink_cli.errors import InputError, MismatchError, OptionError, OutputError
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import TEXT


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    path.write_text("text\n" + "\n".join(f'"{line.replace(chr(34), "")}"' for line in TEXT.splitlines() if line))
    return path


@pytest.fixture
def request_(model: ModelFactory, text_file: Path, rows_file: Path, tmp_path: Path) -> ProfileRequest:
    return ProfileRequest(model("opt"), tmp_path / "whole", (str(text_file), str(rows_file)), batch_size=2)


def run(request: ProfileRequest, name: str, **changes: Any) -> Path:
    changed = replace(request, output=request.output.with_name(name), **changes)
    profile(changed)
    return changed.output


@pytest.mark.parametrize(("parts", "packing"), [(2, True), (3, True), (5, False)])
def test_parts_merge_into_the_whole(request_: ProfileRequest, tmp_path: Path, parts: int, packing: bool) -> None:
    whole = run(request_, "whole", packing=packing)
    pieces = [run(request_, f"part{i}", packing=packing, part=(i, parts)) for i in range(1, parts + 1)]
    header = merge_traces(pieces, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()
    assert [source.name for source in header.sources] == ["river.txt", "rows.csv"]


def test_parts_of_a_calibrated_run_agree(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    request_ = replace(request_, model=model("llama"), active_ratio=0.25, calibration_tokens=64)
    whole = run(request_, "whole")
    pieces = [run(request_, f"part{i}", part=(i, 2)) for i in (1, 2)]
    merge_traces(pieces, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()


def test_datasets_merge_into_a_run_over_both(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    first, second = request_.datasets
    request_ = replace(request_, model=model("llama"))
    calibrated = run(request_, "a", datasets=(first,), active_ratio=0.25)
    taken_over = {"thresholds_from": calibrated}
    whole = run(request_, "whole", **taken_over)
    merge_traces([calibrated, run(request_, "b", datasets=(second,), **taken_over)], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()


def test_the_order_of_the_inputs_does_not_matter(request_: ProfileRequest, tmp_path: Path) -> None:
    whole = run(request_, "whole")
    pieces = [run(request_, f"part{i}", part=(i, 3)) for i in (1, 2, 3)]
    for k, shuffled in enumerate((pieces[::-1], [pieces[1], pieces[2], pieces[0]])):
        merge_traces(shuffled, tmp_path / f"merged{k}")
        assert (tmp_path / f"merged{k}").read_bytes() == whole.read_bytes()


def test_a_part_that_is_missing_is_told(
    request_: ProfileRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = request_.datasets
    pieces = [run(request_, f"part{i}", datasets=(first,), part=(i, 3)) for i in (1, 2, 3)]
    merge_traces([pieces[0], pieces[2]], tmp_path / "merged")
    assert "sequences are there; is a part missing?" in caplog.text
    caplog.clear()
    merge_traces(pieces, tmp_path / "all")
    assert not caplog.text


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"seed": None, "num_samples": 10**6}], ids=["batch", "samples"])
def test_the_same_text_run_with_other_options_is_refused(
    request_: ProfileRequest, tmp_path: Path, changes: dict[str, int | None]
) -> None:
    first, _ = request_.datasets
    a = run(request_, "a", datasets=(first,))
    b = run(request_, "b", datasets=(first,), **changes)
    with pytest.raises(MismatchError, match="both have the same sequences") as caught:
        merge_traces([a, b], tmp_path / "merged")
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)


def test_the_same_text_under_another_name_is_refused(request_: ProfileRequest, tmp_path: Path) -> None:
    first, second = request_.datasets
    (tmp_path / "copy.txt").write_bytes(Path(first).read_bytes())
    a = run(request_, "a", datasets=(first, second))
    b = run(request_, "b", datasets=(str(tmp_path / "copy.txt"),))
    with pytest.raises(MismatchError, match="both have the same"):
        merge_traces([a, b], tmp_path / "merged")


def test_one_trace_merges_into_itself(request_: ProfileRequest, tmp_path: Path) -> None:
    whole = run(request_, "whole")
    merge_traces([whole], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()
    merge_traces([tmp_path / "merged"], tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()


def test_chunks_smaller_than_the_trace(
    request_: ProfileRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuralink_cli.activations.merge._CHUNK_BYTES", 100)
    pieces = [run(request_, f"part{i}", part=(i, 2)) for i in (1, 2)]
    merge_traces(pieces, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == run(request_, "whole").read_bytes()


def test_traces_that_do_not_belong_together(model: ModelFactory, request_: ProfileRequest, tmp_path: Path) -> None:
    relu = replace(request_, model=model("llama", activation="relu"))
    first, second = request_.datasets
    a = run(relu, "a", datasets=(first,))
    others = {
        "model": run(relu, "other-model", model=model("opt")),
        "signal": run(relu, "other-signal", datasets=(second,), signal="intermediate"),
        "calibration": run(relu, "calibrated", datasets=(second,), active_ratio=0.2),
        "the same sequences of 'river.txt'": run(relu, "again", max_tokens=None, datasets=(first,)),
    }
    for difference, other in others.items():
        with pytest.raises(MismatchError) as caught:
            merge_traces([a, other], tmp_path / "merged")
        assert difference in str(caught.value)
        assert str(a) in str(caught.value)
        assert str(other) in str(caught.value)
    calibrated = others["calibration"]
    unequal = run(relu, "unequal", datasets=(first,), active_ratio=0.2)
    if read_calibration(calibrated) != read_calibration(unequal):
        message = "calibration"
    else:
        message = "thresholds .*--thresholds-from"
    with pytest.raises(MismatchError, match=message):
        merge_traces([calibrated, unequal], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_thresholds_that_differ(request_: ProfileRequest, tmp_path: Path) -> None:
    # The same number of calibration tokens, but not the same tokens.
    first, second = request_.datasets
    limits = {"active_ratio": 0.2, "max_tokens": 100}
    a = run(request_, "a", datasets=(first,), **limits)
    b = run(request_, "b", datasets=(second,), **limits)
    with pytest.raises(MismatchError, match=r"thresholds .* in block 'layers\.0'; profile with --thresholds-from .*/a"):
        merge_traces([a, b], tmp_path / "merged")


def test_bad_inputs_and_outputs(request_: ProfileRequest, tmp_path: Path) -> None:
    whole = run(request_, "whole")
    with pytest.raises(OptionError, match="no traces"):
        merge_traces([], tmp_path / "merged")
    with pytest.raises(OutputError, match="already exists"):
        merge_traces([whole], whole)
    with pytest.raises(InputError, match="No such file"):
        merge_traces([whole, tmp_path / "missing"], tmp_path / "merged")
    damaged = bytearray(whole.read_bytes())
    damaged[-50] ^= 4
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(InputError, match="is damaged"):
        merge_traces([tmp_path / "damaged"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def read_calibration(path: Path) -> Mapping[str, Any] | None:
    with Trace(path) as trace:
        return trace.info.calibration
