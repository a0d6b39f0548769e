from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.activations import merge
from neuralink_cli.activations.merge import merge_traces
from neuralink_cli.activations.trace import Trace, TraceBlock, TraceSource
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import InputError, MismatchError, OptionError, OutputError, UnsupportedError
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import TEXT
from tests.traces import Recorded, numbered_digests, recorded


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


def part_of(whole: Recorded, first: int, stop: int) -> Recorded:
    """The trace of some of the sequences, counted over all sources."""
    ends = np.cumsum([0, *whole.lengths]).tolist()
    start, end = ends[first], ends[stop]
    routed = {name: tokens[(tokens >= start) & (tokens < end)] - start for name, tokens in whole.routed.items()}
    blocks = tuple(
        replace(block, routed=None if block.routed is None else routed[block.id].size) for block in whole.header.blocks
    )
    sources, begins = [], 0
    for source in whole.header.sources:
        its = range(max(first, begins), min(stop, begins + source.sequences))
        if its:
            tokens = ends[its.stop] - ends[its.start]
            sources.append(replace(source, first_sequence=its.start - begins, sequences=len(its), tokens=tokens))
        begins += source.sequences
    return Recorded(
        replace(whole.header, blocks=blocks, sources=tuple(sources)),
        whole.lengths[first:stop],
        whole.digests[first:stop],
        {name: fired[start:end] for name, fired in whole.fired.items()},
        routed,
    )


def written(folder: Path, *parts: Recorded) -> list[Path]:
    """The files of some traces, in a folder of their own."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part-{k}" for k in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.write(path)
    return paths


def test_more_tokens_than_32_bits_count_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recorded(0, [[4, 3], [5]], [9], [5])
    inputs = written(tmp_path, part_of(whole, 0, 1), part_of(whole, 1, 3))
    monkeypatch.setattr("neuralink_cli.activations.trace.MOST_TOKENS", 11)
    with pytest.raises(UnsupportedError, match="whole: would have 12 tokens"):
        merge_traces(inputs, tmp_path / "whole")


def merged_sources(inputs: Sequence[Path], output: Path) -> tuple[TraceSource, ...]:
    """The sources of the merged trace."""
    merge_traces(inputs, output)
    with Trace(output) as trace:
        return trace.info.sources


sequences_of_sources = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=25)
@given(st.integers(0, 2**32), sequences_of_sources, st.integers(1, 60), st.data())
def test_consecutive_parts_of_any_sources_become_one_again(
    seed: int, sequences: list[list[int]], chunk_bytes: int, data: st.DataObject
) -> None:
    whole = recorded(seed, sequences, [9, 20], [5])
    count = len(whole.lengths)
    cuts = sorted({0, count, *data.draw(st.sets(st.integers(1, count), max_size=6))})
    advances: list[int] = []
    stages = []

    @contextmanager
    def progress(stage: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
        stages.append((stage, total, unit))
        yield advances.append

    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_CHUNK_BYTES", chunk_bytes)
        folder = Path(name)
        parts = written(folder, *(part_of(whole, first, stop) for first, stop in pairwise(cuts)))
        whole.write(folder / "whole")
        summary = merge_traces(data.draw(st.permutations(parts)), folder / "merged", progress=progress)
        assert (folder / "merged").read_bytes() == (folder / "whole").read_bytes()
        with Trace(folder / "whole") as trace:
            assert summary.content_sha256 == trace.content_sha256
    sources = whole.header.sources
    assert summary.tokens == sum(map(sum, sequences))
    assert [(one.name, one.sequences, one.tokens) for one in summary.sources] == [
        (one.name, one.sequences, one.tokens) for one in sources
    ]
    rows = sum(block.row_bytes * len(whole.fired[block.id]) for block in whole.header.blocks[:2])
    # Of an expert, a row and the number of its token; of each sequence its length and its digest.
    expected = rows + whole.routed["layers.2"].size * (1 + 4) + count * (4 + 16)
    assert sum(advances) == expected
    assert stages == [("merge", expected, "B")]


def test_datasets_keep_the_order_that_an_input_has_them_in(tmp_path: Path) -> None:
    whole = recorded(0, [[2, 1, 3], [4, 1]], [9], [])
    last, first = (replace(source, name=name) for source, name in zip(whole.header.sources, "ba", strict=True))
    whole.header = replace(whole.header, sources=(last, first))
    whole.write(tmp_path / "whole")
    parts = written(tmp_path / "together", part_of(whole, 0, 1), part_of(whole, 1, 4), part_of(whole, 4, 5))
    for inputs in permutations(parts):
        merge_traces(inputs, tmp_path / "merged", overwrite=True)
        assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    # Nobody has them together: by name.
    apart = written(tmp_path / "apart", part_of(whole, 0, 3), part_of(whole, 3, 5))
    assert [source.name for source in merged_sources(apart, tmp_path / "by-name")] == ["a", "b"]


def test_inputs_that_contradict_each_other_have_one_order_all_the_same(tmp_path: Path) -> None:
    whole = recorded(0, [[2, 1], [4, 1]], [9], [])
    first, second = whole.header.sources
    one, other = part_of(whole, 1, 3), part_of(whole, 1, 3)
    one.digests, other.digests = whole.digests[:2], whole.digests[2:]
    # One has a sequence of the first source before one of the second, the other the other way round.
    sources = (replace(second, first_sequence=1, sequences=1, tokens=1), replace(first, sequences=1, tokens=4))
    other.header = replace(other.header, sources=sources)
    paths = written(tmp_path, one, other)
    found = merged_sources(paths, tmp_path / "merged")
    assert [source.name for source in found] == ["source-0", "source-1", "source-0"]
    assert merged_sources(paths[::-1], tmp_path / "again") == found


@settings(max_examples=25)
@given(st.tuples(st.integers(0, 6), st.integers(1, 3)), st.tuples(st.integers(0, 6), st.integers(1, 3)))
def test_parts_that_share_a_sequence_are_refused_and_consecutive_ones_joined(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    whole = recorded(0, [[2, 1, 3, 1, 1, 2, 1, 4, 1]], [9], [])
    ranges = [range(first, first + count) for first, count in (one, other)]
    with TemporaryDirectory() as name:
        parts = written(Path(name), *(part_of(whole, sequences.start, sequences.stop) for sequences in ranges))
        if set(ranges[0]) & set(ranges[1]):
            with pytest.raises(MismatchError, match="they both have the same sequences of 'source-0'"):
                merge_traces(parts, Path(name) / "merged")
            return
        sources = merged_sources(parts, Path(name) / "merged")
    found = [range(source.first_sequence, source.first_sequence + source.sequences) for source in sources]
    first, second = sorted(ranges, key=lambda sequences: sequences.start)
    assert found == ([range(first.start, second.stop)] if first.stop == second.start else [first, second])


@pytest.mark.parametrize(
    "change", [{"name": "x"}, {"sha256": "f" * 64}, {"total_sequences": 9}, {"parameters": {"split": "test"}}]
)
def test_parts_of_other_data_are_kept_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = recorded(0, [[2, 1, 3, 1]], [9], [])
    first, second, again = (part_of(whole, 0, 2), part_of(whole, 2, 4), part_of(whole, 0, 2))
    for part in (second, again):
        part.header = replace(part.header, sources=(replace(part.header.sources[0], **change),))
    paths = written(tmp_path, first, second, again)
    sources = [part.header.sources[0] for part in (first, second, again)]
    assert merged_sources(paths[:2], tmp_path / "merged") == tuple(sources[:2])
    if "sha256" in change:
        assert merged_sources(paths[::2], tmp_path / "both") == tuple(sources[::2])
    else:
        with pytest.raises(MismatchError, match="both have the same sequences of"):
            merge_traces(paths[::2], tmp_path / "both")


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize(
    ("one", "other", "contained"),
    [([1, 2], [2, 1], True), ([1, 2, 3], [3, 2], True), ([2], [1, 2], True), ([1, 2], [2, 3], False)],
)
def test_a_dataset_all_of_whose_text_is_in_another_is_refused(
    tmp_path: Path, one: list[int], other: list[int], contained: bool, missing: int
) -> None:
    parts = [recorded(0, [[1] * len(texts)], [9], []) for texts in (one, other)]
    for part, texts, key, lacks in zip(parts, (one, other), "ab", (0, missing), strict=True):
        (source,) = part.header.sources
        part.digests = np.concatenate([numbered_digests(1, text) for text in texts])
        # Parts of a dataset may well share a text.
        changed = replace(source, name=key, sha256=key * 64, total_sequences=source.sequences + lacks)
        part.header = replace(part.header, sources=(changed,))
    paths = written(tmp_path, *parts)
    if contained and not missing:
        with pytest.raises(MismatchError, match=r"both have the same text \('a' and 'b'\)"):
            merge_traces(paths, tmp_path / "merged")
    else:
        assert len(merged_sources(paths, tmp_path / "merged")) == 2


def test_the_origin_is_that_of_the_first_part_that_has_one(tmp_path: Path) -> None:
    whole = recorded(0, [[2, 1, 3, 1]], [9], [])
    origins = [None, Origin("a/model", "1" * 40), Origin("b/model", "2" * 40)]
    parts = [part_of(whole, k, k + 1) for k in range(3)]
    for part, origin in zip(parts, origins, strict=True):
        part.header = replace(part.header, origin=origin)
    paths = written(tmp_path, *parts)
    for inputs, expected in ((paths, origins[1]), (paths[::-1], origins[1]), (paths[:1], None)):
        merge_traces(inputs, tmp_path / "merged", overwrite=True)
        with Trace(tmp_path / "merged") as trace:
            assert trace.info.origin == expected


def test_blocks_that_differ_are_named(tmp_path: Path) -> None:
    whole = recorded(0, [[2, 1]], [9, 9], [])
    first, second = whole.header.blocks
    part_of(whole, 0, 1).write(tmp_path / "one")
    cases: list[tuple[str, tuple[TraceBlock, ...], str]] = [
        ("fewer", (first,), "2 and 1 blocks"),
        ("wider", (first, replace(second, hidden=8)), "blocks TraceBlock"),
        ("renamed", (first, replace(second, id="layers.7", threshold=1.0)), "blocks TraceBlock"),
        ("higher", (first, replace(second, threshold=1.0)), r"thresholds 0\.0 and 1\.0 in block 'layers\.1'"),
    ]
    for name, blocks, complaint in cases:
        part = part_of(whole, 1, 2)
        part.fired = {block.id: part.fired["layers.0"] for block in blocks}
        part.header = replace(part.header, blocks=blocks)
        part.write(tmp_path / name)
        with pytest.raises(MismatchError, match=complaint):
            merge_traces([tmp_path / "one", tmp_path / name], tmp_path / "merged")


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
