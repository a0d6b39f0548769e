from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.activations.spool import Spool
from neuralink_cli.errors import OutputError


def test_rows_come_back_by_block_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected: dict[int, list[npt.NDArray[np.uint8]]] = {0: [], 1: [], 2: []}
    with Spool(tmp_path / "out", [3, 5, 1]) as spool:
        for _ in range(50):
            block = int(rng.integers(2))
            rows = rng.integers(0, 256, (int(rng.integers(7)), [3, 5][block]), dtype=np.uint8)
            expected[block].append(rows)
            spool.append(block, rows)
        for block in (1, 0, 1):
            np.testing.assert_array_equal(np.concatenate(list(spool.rows(block))), np.concatenate(expected[block]))
        assert list(spool.rows(2)) == []
        # Its file has no name: nothing is left when the process is killed.
        assert list(tmp_path.iterdir()) == []


def test_tokens_come_back_beside_the_rows_of_their_block(tmp_path: Path) -> None:
    with Spool(tmp_path / "out", [2, 3]) as spool:
        expected: dict[int, list[int]] = {0: [], 1: []}
        for k in range(12):
            block = k * 5 % 3 % 2
            tokens = np.arange(k, dtype=np.int32) * 70_000 + k
            spool.append(block, np.full((k, [2, 3][block]), k, dtype=np.uint8))
            spool.append_tokens(block, tokens)
            expected[block] += tokens.tolist()
        for block in (1, 0):
            chunks = list(spool.tokens(block))
            assert {chunk.dtype for chunk in chunks} == {np.dtype(np.uint32)}
            assert np.concatenate(chunks).tolist() == expected[block]
            assert spool.count(block) == len(expected[block]) == sum(len(rows) for rows in spool.rows(block))


def test_what_a_disk_takes_in_pieces_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: memoryview) -> int:
            return int(self.file.write(data[:3]))

    rows = np.arange(20, dtype=np.uint8).reshape(4, 5)
    with Spool(tmp_path / "out", [5]) as spool:
        monkeypatch.setattr(spool, "_file", Slow(spool._file))
        spool.append(0, rows)
        spool.append(0, rows[:, ::-1])
        np.testing.assert_array_equal(np.concatenate(list(spool.rows(0))), np.concatenate([rows, rows[:, ::-1]]))


def test_a_row_of_another_width_is_refused(tmp_path: Path) -> None:
    with Spool(tmp_path / "out", [3]) as spool, pytest.raises(ValueError, match="4 bytes, not 3"):
        spool.append(0, np.zeros((1, 4), dtype=np.uint8))


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, _position: int) -> None:
            pass

        def write(self, _data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    with Spool(tmp_path / "out", [1]) as spool:
        monkeypatch.setattr(spool, "_file", Full())
        with pytest.raises(OutputError, match="No space left on device"):
            spool.append(0, np.zeros((1, 1), dtype=np.uint8))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        Spool(tmp_path / "missing" / "out", [1])
