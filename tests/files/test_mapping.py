"""Mapped ranges hold what the file holds, keep no descriptor, and are gone with their last view."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.files.mapping import map_file

CONTENT = np.random.default_rng(0).integers(0, 256, 100_001, dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "mapped-file").write_bytes(CONTENT.tobytes())
    return tmp_path / "mapped-file"


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("mapped-file")


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 4096), (4095, 2), (8192, 50_000), (0, 100_001)])
def test_a_range_is_what_the_file_holds(path: Path, offset: int, size: int) -> None:
    with ByteFile(path) as file:
        data = file.map_range(offset, size)
    np.testing.assert_array_equal(data, CONTENT[offset : offset + size])
    assert data.flags.c_contiguous


def test_what_is_written_stays_here(path: Path) -> None:
    with ByteFile(path) as file:
        first, second = file.map_range(10, 100), file.map_range(10, 100)
    first[:] = 0
    assert not first.any()
    np.testing.assert_array_equal(second, CONTENT[10:110])
    assert path.read_bytes() == CONTENT.tobytes()


def test_a_mapping_goes_with_its_last_view(path: Path) -> None:
    with ByteFile(path) as file:
        view = file.map_range(0, 5000).view("<u2")[5:]
        gc.collect()
        assert mappings() == 1
        assert view[0] == int.from_bytes(CONTENT[10:12].tobytes(), "little")
        del view
        gc.collect()
        assert mappings() == 0


def test_no_mapping_takes_a_descriptor(path: Path) -> None:
    with ByteFile(path) as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        kept = [file.map_range(0, 10) for _ in range(50)]
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert all((data == CONTENT[:10]).all() for data in kept)


def test_what_cannot_be_mapped(path: Path) -> None:
    file = ByteFile(path)
    file.close()
    with pytest.raises(InputError, match=r"mapped-file: cannot be mapped into memory \(Bad file descriptor\)"):
        file.map_range(0, 10)
    with pytest.raises(OSError, match="Invalid argument"), path.open("rb") as handle:
        map_file(handle.fileno(), 0, 0)
