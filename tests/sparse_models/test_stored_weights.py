"""Weights that stay in DRAM: in memory once, mapped from the file or converted in stretches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.sparse_models import stored_weights
from neuralink_cli.sparse_models.stored_weights import StoredWeights, resident_in, with_equals_shared
from neuralink_cli.weight_formats.formats import Q8_0
from neuralink_cli.weight_formats.quantising import dequantise, quantise_rows
from tests.checkpoints import RawTensor, encode

LARGE = (700, 1024)
VALUES = np.random.default_rng(0).normal(size=LARGE).astype(np.float16)


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    rows = np.empty((LARGE[0], Q8_0.row_bytes(LARGE[1])), np.uint8)
    assert quantise_rows(VALUES.astype("<f4").reshape(-1).view(np.uint8), "F32", VALUES.shape[1], Q8_0, rows) is None
    other = VALUES.copy()
    other[-1, -1] += 1
    raw = VALUES.tobytes()
    tensors = {
        "head": RawTensor("F16", LARGE, raw),
        "embedding": RawTensor("F16", LARGE, raw),
        "other": RawTensor("F16", LARGE, other.tobytes()),
        "rounded": RawTensor("U8", rows.shape, rows.tobytes()),
        "small": RawTensor("F16", (4,), raw[:8]),
        "scalar": RawTensor("F32", (), bytes(4)),
        "eight": RawTensor("F8_E4M3", (4,), bytes(4)),
    }
    # The data of a layout starts on a whole page; here it starts on a whole element at least.
    padded = (encode(tensors, {"padding": " " * spaces}) for spaces in range(8))
    (tmp_path / "file").write_bytes(next(data for data in padded if data[0] % 8 == 0))
    return TensorFile(tmp_path / "file")


def stored(file: TensorFile, name: str) -> StoredWeights:
    entry = file.entry(name)
    return StoredWeights(file, name, entry.dtype, entry.shape)


def mapped(data: torch.Tensor) -> bool:
    """Whether the system says that a tensor's memory is a mapped file."""
    address = data.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *_, name = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < stop:
            return name.endswith("/file")
    return False


def test_what_is_stored_as_it_is_needed_is_mapped(file: TensorFile) -> None:
    found = stored(file, "other")[...].to(device="cpu", dtype=torch.float16)
    assert mapped(found)
    np.testing.assert_array_equal(found[:-1].numpy(), VALUES[:-1])
    # What a model writes stays its own.
    found[0, 0] = 7
    assert stored(file, "other").to()[0, 0] == VALUES[0, 0]
    file.close()
    assert found[1, 1] == VALUES[1, 1]


def test_small_tensors_take_no_mapping(file: TensorFile) -> None:
    found = stored(file, "small").to(dtype=torch.float16)
    assert not mapped(found)
    assert found.tolist() == VALUES[0, :4].tolist()
    assert stored(file, "scalar").to(dtype=torch.float16).shape == ()


@pytest.mark.parametrize("stretch", [1, 5000, 1 << 22])
def test_other_dtypes_are_converted(file: TensorFile, monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    monkeypatch.setattr(stored_weights, "_STRETCH", stretch)
    np.testing.assert_array_equal(stored(file, "head").to(dtype=torch.float32).numpy(), VALUES.astype(np.float32))
    rows = file.read("rounded").reshape(file.entry("rounded").shape)
    rounded = StoredWeights(file, "rounded", "F16", LARGE, Q8_0.name)
    expected = torch.from_numpy(dequantise(rows, Q8_0))
    torch.testing.assert_close(rounded.to(), expected, rtol=0, atol=0)
    torch.testing.assert_close(rounded.to(dtype=torch.bfloat16), expected.bfloat16(), rtol=0, atol=0)


def test_equal_tensors_are_in_memory_once(file: TensorFile) -> None:
    names = ("head", "embedding", "other", "small")
    found = with_equals_shared((name, stored(file, name)) for name in names)
    for dtype in (torch.float16, torch.float32):
        made = {name: each.to(dtype=dtype) for name, each in found.items()}
        assert made["head"].data_ptr() == made["embedding"].data_ptr() != made["other"].data_ptr()
        assert resident_in(made.values()) >= 2 * VALUES.size * dtype.itemsize
        assert resident_in(made.values()) < 2.1 * VALUES.size * dtype.itemsize


def test_dtypes_that_need_scales_are_refused(file: TensorFile) -> None:
    with pytest.raises(UnsupportedError, match="cannot compute with tensors of dtype F8_E4M3"):
        stored(file, "eight").to(dtype=torch.float32)
