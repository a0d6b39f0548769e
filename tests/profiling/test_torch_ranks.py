"""What ranks exchange. That two of them write the trace of one is tested with torchrun itself, in tests/cli."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.calibration.sources import share_of
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.profiling import torch_ranks
from neuralink_cli.profiling.launch import Launch
from neuralink_cli.profiling.ranks import Ranks
from neuralink_cli.profiling.torch_ranks import RowsOfAll, device_of, new_remarks, pieces, require_equal
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile

LAUNCH = Launch(rank=5, count=8, local_rank=1, local_count=4, node=1, attempt="0")


@given(st.integers(0, 50), st.integers(1, 9))
def test_the_shares_of_all_ranks_are_the_whole(items: int, ranks: int) -> None:
    shares = [range(items)[share_of(items, rank, ranks)] for rank in range(ranks)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("gpus", "name", "expected"),
    [
        (0, "auto", "auto"),
        (0, "cpu", "cpu"),
        (0, "cuda", "cuda:1"),
        (4, "auto", "cuda:1"),
        (4, "cuda", "cuda:1"),
        (4, "cpu", "cpu"),
        (0, "mps", "mps"),
    ],
)
def test_every_rank_of_a_machine_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_of(LAUNCH, name) == expected


def test_no_gpu_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(OptionError, match="the 4 ranks on this machine have 3 GPUs"):
        device_of(LAUNCH, "auto")
    with pytest.raises(OptionError, match="--device cuda:2 is one GPU for 4 ranks"):
        device_of(LAUNCH, "cuda:2")
    assert device_of(replace(LAUNCH, local_rank=0, local_count=1), "cuda:2") == "cuda:2"


def test_what_differs_between_ranks_is_named() -> None:
    require_equal([{"a": "1", "b": "2"}] * 3)
    with pytest.raises(MismatchError, match="ranks 0 and 2 do not run the same: b is 2 and 3; start all"):
        require_equal([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}])
    with pytest.raises(MismatchError, match="c is nothing and 1"):
        require_equal([{"a": "1"}, {"a": "1", "c": "1"}])
    # The difference may be where the message is shortened.
    with pytest.raises(MismatchError):
        require_equal([{"a": "x" * 500 + "1" + "x" * 500}, {"a": "x" * 500 + "2" + "x" * 500}])


def test_a_warning_is_passed_on_once_and_only_if_rank_0_has_not_given_it() -> None:
    assert new_remarks([["a"], ["a", "b"], ["b", "c", "c"]]) == [(1, "b"), (2, "c")]


@given(st.lists(st.integers(0, 40), max_size=9), st.integers(1, 16))
def test_pieces_have_the_bytes_of_the_chunks(sizes: list[int], size: int) -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, 256, (count, 3), dtype=np.uint8)[:, :2] for count in sizes]
    cut = [piece.tobytes() for piece in pieces(iter(chunks), size)]
    assert b"".join(cut) == b"".join(chunk.tobytes() for chunk in chunks)
    assert all(len(piece) == size for piece in cut[:-1])
    assert b"" not in cut


class Recorded:
    """The rows of one rank: a block that is no expert, and an expert."""

    def __init__(self, rank: int, counts: tuple[int, int]) -> None:
        rng = np.random.default_rng(rank)
        self.of_blocks = [rng.integers(0, 256, (count, 3), dtype=np.uint8) for count in counts]
        self.of_tokens = np.sort(rng.integers(0, 1 << 32, counts[1], dtype=np.uint32))

    def rows(self, block: int) -> Iterator[npt.NDArray[np.uint8]]:
        yield from np.array_split(self.of_blocks[block], 3)

    def tokens(self, block: int) -> Iterator[npt.NDArray[np.uint32]]:
        assert block == 1
        yield from np.array_split(self.of_tokens, 3)


def joined(chunks: Iterable[npt.NDArray[Any]]) -> bytes:
    return b"".join(chunk.tobytes() for chunk in chunks)


def test_rank_0_has_the_rows_of_all_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ranks, "PIECE_BYTES", 64)
    counts = [(100, 7), (0, 0), (41, 90)]
    ranks = [Recorded(rank, of_rank) for rank, of_rank in enumerate(counts)]
    sent: dict[int, Iterator[bytes]] = {}

    def sending(rank: int) -> Iterator[bytes]:
        # As `send_rows` goes through them.
        for chunks in (ranks[rank].rows(0), ranks[rank].rows(1), ranks[rank].tokens(1)):
            yield from (piece.tobytes() for piece in pieces(chunks, 64))

    def receive(tensor: torch.Tensor, rank: int) -> None:
        data = next(sent.setdefault(rank, sending(rank)))
        tensor.numpy()[:] = np.frombuffer(data, dtype=np.uint8)

    monkeypatch.setattr(dist, "recv", receive)
    rows = RowsOfAll(ranks[0], [(3, 0), (3, 4)], counts)
    found = [joined(rows.rows(0)), joined(rows.rows(1)), joined(rows.tokens(1))]
    assert found == [
        joined(rank.of_blocks[0] for rank in ranks),
        joined(rank.of_blocks[1] for rank in ranks),
        joined(rank.of_tokens for rank in ranks),
    ]


class Many(Ranks):
    count = 100


def test_there_is_something_to_do_for_every_rank(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    request = ProfileRequest(model("opt"), tmp_path / "out", (str(text_file),), max_tokens=64)
    with pytest.raises(OptionError, match="there are only 1 batches for 100 ranks; start fewer"):
        profile(request, ranks=Many())
    with pytest.raises(OptionError, match="--part 1/2 and torchrun both share the data out; drop one"):
        profile(replace(request, part=(1, 2)), ranks=Many())
    assert list(tmp_path.iterdir()) == []
