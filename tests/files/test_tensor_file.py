from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.files.tensor_file import TensorFile
from tests.checkpoints import ELEMENT_BYTES, encode, random_tensor


def a_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", sorted(ELEMENT_BYTES))
def test_reads_the_bytes_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    tensors = {name: random_tensor(random, dtype, 3, 5) for name in ("b", "a", "../../x")}
    with TensorFile(a_file(tmp_path / "x.safetensors", encode(tensors))) as file:
        for name, tensor in tensors.items():
            assert name in file
            assert file.entry(name).shape == (3, 5)
            assert file.read(name).tobytes() == tensor.data
            assert file.read(name, 2, 9).tobytes() == tensor.data[2:9]
            buffer = np.zeros(4, dtype=np.uint8)
            file.read_into(name, buffer, 3)
            assert buffer.tobytes() == tensor.data[3:7]
        assert "c" not in file


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {str(k): random_tensor(random, "F32", 64, 64) for k in range(16)}
    with (
        TensorFile(a_file(tmp_path / "x.safetensors", encode(tensors))) as file,
        ThreadPoolExecutor(8) as pool,
    ):
        names = list(tensors) * 20
        assert [data.tobytes() for data in pool.map(file.read, names)] == [tensors[name].data for name in names]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reads_nothing_outside_a_tensor(tmp_path: Path) -> None:
    tensors = {name: random_tensor(np.random.default_rng(0), "U8", 4) for name in "ab"}
    with TensorFile(a_file(tmp_path / "x.safetensors", encode(tensors))) as file:
        with pytest.raises(ValueError, match="lie outside tensor 'a'"):
            file.read("a", 0, 5)
        with pytest.raises(ValueError, match="lie outside tensor 'b'"):
            file.read_into("b", np.empty(1, dtype=np.uint8), -1)
        with pytest.raises(InputError, match="tensor 'c' is missing"):
            file.read("c")


def test_names_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(InputError, match="Git LFS pointer, not the weights; fetch them with `git lfs pull`"):
        TensorFile(a_file(tmp_path / "model.safetensors", pointer))


HUGE = struct.pack("<Q", 1 << 63)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"too short for a safetensors file \(0 bytes\)"),
        (b"\2\0\0\0\0\0\0", r"too short for a safetensors file \(7 bytes\)"),
        (b"\2\0\0\0\0\0\0\0", "truncated: the header should take 2 bytes, the file has 8"),
        (b"\2\0\0\0\0\0\0\0{", "truncated: the header should take 2 bytes, the file has 9"),
        (
            struct.pack("<Q", 100_000_001) + b"{",
            "header length 100,000,001 is over",
        ),
        (HUGE + b"{}", "is over the format's limit"),
        (b"\x80\2}q\0(X\1\0\0\0", "is over the format's limit"),
        (b"\0\0\0\0\0\0\0\0", "does not start with"),
        (b"\2\0\0\0\0\0\0\0{}x", "longer than its header says"),
    ],
)
def test_refuses(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = a_file(tmp_path / "model.safetensors", content)
    with pytest.raises(InputError, match=complaint) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_refuses_a_header_of_the_greatest_length_without_reading_it_into_the_void(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="truncated: the header should take 100,000,000 bytes"):
        TensorFile(a_file(tmp_path / "model.safetensors", struct.pack("<Q", 100_000_000) + b"{"))


def test_refuses_what_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be opened \(No such file or directory\)"):
        TensorFile(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="is a directory, not a regular file"):
        TensorFile(tmp_path)


def test_says_when_the_file_shrinks_while_open(tmp_path: Path) -> None:
    path = a_file(tmp_path / "x.safetensors", encode({"a": random_tensor(np.random.default_rng(0), "U8", 4096)}))
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(InputError, match="file ended while it was being read"):
            file.read("a")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = a_file(tmp_path / "good.safetensors", encode({}))
    bad = a_file(tmp_path / "bad.safetensors", b"\2\0\0\0\0\0\0\0[]")
    before = open_descriptors()
    with TensorFile(good) as file:
        assert open_descriptors() == before + 1
    file.close()
    for path in (bad, tmp_path):
        with pytest.raises(InputError):
            TensorFile(path)
    assert open_descriptors() == before
