"""Traces read back as they were written, in any ranges of tokens, and those that make no sense refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.activations import trace as trace_module
from neuralink_cli.activations.trace import (
    Trace,
    TraceBlock,
    TraceHeader,
    TraceSource,
    bytes_per_token,
    trace_block,
    write_trace,
)
from neuralink_cli.architectures.blocks import BlockPart, ExpertPlace, FFNBlock
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.files.schema import Schema
from neuralink_cli.files.stage_file import StreamedTensor, write_stage_file
from tests.traces import Recorded, numbered_digests, recorded


def test_a_block_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = TraceBlock("layers.0", 8, 4, "relu", 0.0, {"up": 8, "down": 8})
    header = TraceHeader(
        {"fingerprint": "0" * 64, "model_type": "opt", "architecture": "opt"},
        None,
        "gate",
        None,
        (block, block),
        (TraceSource("x", "0" * 64, 0, 1, 1, 3, {}),),
    )

    def write_once(
        path: Path, schema: Schema, document: Mapping[str, Any], tensors: Sequence[StreamedTensor], **options: Any
    ) -> str:
        return write_stage_file(path, schema, document, tensors[1:], **options)

    # A writer that is not ours: the document has the block twice, the tensors once.
    monkeypatch.setattr(trace_module, "write_stage_file", write_once)
    bits = np.zeros((3, 1), dtype=np.uint8)
    write_trace(tmp_path / "t", header, np.array([3], dtype=np.uint32), numbered_digests(1), lambda _: [bits])
    with pytest.raises(InputError, match="lists a block twice"):
        Trace(tmp_path / "t")


sizes = st.lists(st.integers(1, 20), max_size=3)
texts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=40)
@given(st.integers(0, 2**32), texts, sizes.filter(bool), sizes, st.data())
def test_any_range_of_tokens_reads_back_as_it_was_written(
    seed: int, sequences: list[list[int]], neurons: list[int], experts: list[int], data: st.DataObject
) -> None:
    made = recorded(seed, sequences, neurons, experts)
    total = sum(map(sum, sequences))
    with TemporaryDirectory() as folder:
        made.write(Path(folder) / "t")
        with Trace(Path(folder) / "t") as trace:
            assert trace.info == made.header
            assert trace.info.tokens == total
            ends = np.cumsum([sum(source) for source in sequences]).tolist()
            assert trace.source_ranges() == tuple(zip([0, *ends][:-1], ends, strict=True))
            assert [lengths.tolist() for lengths in trace.source_sequence_lengths()] == sequences
            assert trace.sequence_starts.tolist() == [sum(made.lengths[:k].tolist()) for k in range(len(made.lengths))]
            assert trace.sequence_digests.tolist() == made.digests.tolist()
            for block in trace.info.blocks:
                start = data.draw(st.integers(0, total))
                stop = data.draw(st.integers(start, total))
                cases: list[tuple[tuple[int, ...], int, int]]
                cases = [((), 0, total), ((start,), start, total), ((start, stop), start, stop)]
                for bounds, first, last in cases:
                    whole = made.fired[block.id][first:last]
                    on = made.routed.get(block.id, np.arange(total))
                    on = on[(on >= first) & (on < last)]
                    assert trace.tokens_of(block, *bounds).tolist() == on.tolist()
                    assert trace.tokens_of(block, *bounds).dtype == np.uint32
                    for found, expected in (
                        (trace.fired(block, *bounds), whole[on - first]),
                        (trace.fired_by_token(block, *bounds), whole),
                    ):
                        assert found.shape == (len(expected), block.row_bytes)
                        assert np.array_equal(found, np.packbits(expected, axis=1, bitorder="little"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"routed": [0, 3, 2]}, "not ascending tokens"),
        ({"routed": [1, 1, 5]}, "not ascending tokens"),
        ({"routed": [0, 1, 6]}, "not ascending tokens"),
        ({"lengths": [4, 1, 2]}, "do not add up"),
        ({"lengths": [3, 2, 1, 1]}, "does not fit the sources"),
        ({"lengths": [3, 3]}, "does not fit the sources"),
        ({"digests": np.zeros((2, 16), np.uint8)}, "sequence_digests does not fit"),
        ({"digests": np.zeros((4, 16), np.uint8)}, "sequence_digests does not fit"),
        ({"digests": np.zeros((3, 17), np.uint8)}, "sequence_digests does not fit"),
    ],
)
def test_tokens_and_sequences_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    made = recorded(0, [[4], [1, 1]], [9], [5])
    name = made.header.blocks[1].id
    given_tokens = np.array(change.get("routed", [0, 2, 5]))
    first, expert = made.header.blocks
    made.header = replace(made.header, blocks=(first, replace(expert, routed=3)))
    fired = {first.id: made.fired[first.id], name: np.ones((7, 5), dtype=bool)}
    lengths = np.array(change.get("lengths", [4, 1, 1]), dtype=np.uint32)
    digests = change.get("digests", made.digests)
    Recorded(made.header, lengths, digests, fired, {name: given_tokens}).write(tmp_path / "t")
    with pytest.raises(InputError, match=complaint):
        Trace(tmp_path / "t")


def test_an_expert_may_run_on_the_first_and_the_last_token_or_on_none(tmp_path: Path) -> None:
    made = recorded(0, [[4], [1, 1]], [9], [5, 5])
    first, one, other = made.header.blocks
    made.header = replace(made.header, blocks=(first, replace(one, routed=2), replace(other, routed=0)))
    routed = {one.id: np.array([0, 5]), other.id: np.array([], dtype=int)}
    Recorded(made.header, made.lengths, made.digests, made.fired, routed).write(tmp_path / "t")
    with Trace(tmp_path / "t") as trace:
        assert [trace.tokens_of(block).tolist() for block in trace.info.blocks[1:]] == [[0, 5], []]
        assert not trace.fired_by_token(trace.info.blocks[2]).any()


def ffn_block(neurons: int, expert: ExpertPlace | None = None) -> FFNBlock:
    parts = tuple(BlockPart(role, f"{role}.weight", 0, dtype, None) for role, dtype in (("up", "F32"), ("down", "F16")))
    return FFNBlock("layers.0", neurons, 6, "relu", parts, expert)


def test_what_the_trace_knows_of_a_block_comes_from_the_checkpoint() -> None:
    expected = TraceBlock("layers.0", 9, 6, "relu", 0.5, {"up": 24, "down": 12}, None)
    assert trace_block(ffn_block(9), 0.5) == expected
    assert trace_block(ffn_block(9, ExpertPlace("experts", 0)), 0.5) == replace(expected, routed=0)


def test_the_bytes_of_a_token_are_whole_rows_and_of_experts_their_share_with_a_number() -> None:
    assert bytes_per_token([ffn_block(8), ffn_block(9), ffn_block(17)]) == 1 + 2 + 3
    assert bytes_per_token([ffn_block(9), ffn_block(17, ExpertPlace("experts", 0, 0.25))]) == 2 + 0.25 * (3 + 4)


def test_more_tokens_than_32_bits_count_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recorded(0, [[4], [1, 1]], [9], [5])
    made.write(tmp_path / "t")
    monkeypatch.setattr("neuralink_cli.activations.trace.MOST_TOKENS", 5)
    with pytest.raises(InputError, match="says that it has 6 tokens, more than 32 bits count"):
        Trace(tmp_path / "t")
    with pytest.raises(UnsupportedError, match=r"would have 6 tokens, but .* at most 5; profile or merge less text"):
        made.write(tmp_path / "u")
    assert not (tmp_path / "u").exists()
