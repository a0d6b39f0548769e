from __future__ import annotations

import errno
from pathlib import Path

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
