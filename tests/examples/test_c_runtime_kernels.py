"""The kernels of the runtime in C against numpy, for every weight format and kind of machine."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.weight_formats.formats import BLOCK_FORMATS
from neuralink_cli.weight_formats.quantising import dequantise
from tests.examples.conftest import CRuntime

# The kinds of kernels.h. mxfp4 is not among them: a layout with it is refused.
FORMATS = ("F32", "F16", "BF16", "q8_0", "q4_0", "iq4_nl")
ROUNDING = 2.0**-24
_DOT = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
_ADD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p)


class Kernels(ctypes.Structure):
    """`NlKernels`."""

    _fields_ = (("name", ctypes.c_char_p), ("dot", _DOT * len(FORMATS)), ("add", _ADD * len(FORMATS)))


def kernels(runtime: CRuntime, name: str | None) -> Any:
    library = runtime.library()
    library.nl_kernels.restype = ctypes.POINTER(Kernels)
    found = library.nl_kernels(None if name is None else name.encode())
    if not found:
        pytest.skip(f"this machine has no {name}")
    return found.contents


def random_row(random: np.random.Generator, weights: str, count: int) -> npt.NDArray[np.uint8]:
    """The bytes of a row of weights; of blocks, every code and scales of every size, but finite."""
    if weights not in BLOCK_FORMATS:
        values = random.standard_normal(count) * 10.0 ** random.integers(-6, 3, count)
        if weights == "BF16":
            return (values.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
        return values.astype({"F32": "<f4", "F16": "<f2"}[weights]).view(np.uint8)
    form = BLOCK_FORMATS[weights]
    blocks = random.integers(0, 256, (count // 32, form.block_bytes)).astype(np.uint8)
    scales = random.integers(0, 0x4400, len(blocks)) | (random.integers(0, 2, len(blocks)) << 15)
    blocks[:, :2] = scales.astype("<u2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def values_of(row: npt.NDArray[np.uint8], weights: str) -> npt.NDArray[np.float64]:
    if weights in BLOCK_FORMATS:
        values: Any = dequantise(row[None], BLOCK_FORMATS[weights])[0]
    elif weights == "BF16":
        values = (row.view("<u2").astype("<u4") << 16).view("<f4")
    else:
        values = row.view({"F32": "<f4", "F16": "<f2"}[weights])
    found: npt.NDArray[np.float64] = values.astype(np.float64)
    return found


def address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data


@pytest.mark.parametrize("name", ["scalar", "avx2", "neon"])
@pytest.mark.parametrize("weights", FORMATS)
def test_dot_and_add(c_runtime: CRuntime, name: str, weights: str) -> None:
    known = kernels(c_runtime, name)
    dot, add = known.dot[FORMATS.index(weights)], known.add[FORMATS.index(weights)]
    random = np.random.default_rng(FORMATS.index(weights))
    counts = (32, 64, 96, 1024) if weights in BLOCK_FORMATS else (1, 3, 7, 8, 9, 31, 32, 45, 64, 1000)
    for count in counts:
        for _ in range(10):
            # One byte further than any alignment, as rows lie in bundles.
            row = random_row(random, weights, count)
            moved = np.zeros(row.size + 1, dtype=np.uint8)
            moved[1:] = row
            weight = values_of(row, weights)
            values = random.standard_normal(count).astype(np.float32)
            found = dot(address(moved) + 1, count, address(values))
            exact = weight @ values.astype(np.float64)
            assert abs(found - exact) <= (count + 3) * ROUNDING * (abs(weight) @ abs(values)) + 1e-38
            scale = np.float32(random.standard_normal())
            # Room behind the values that must stay as it is.
            sums = np.concatenate((values, np.full(8, 7, dtype=np.float32)))
            add(address(moved) + 1, count, scale, address(sums))
            exact_sums = values.astype(np.float64) + np.float64(scale) * weight
            bound = 4 * ROUNDING * (abs(values) + abs(scale * weight)) + 1e-38
            assert (abs(sums[:count] - exact_sums) <= bound).all()
            assert (sums[count:] == 7).all()


def test_the_best_kernels_of_the_machine_are_chosen(c_runtime: CRuntime) -> None:
    library = c_runtime.library()
    library.nl_kernels.restype = ctypes.POINTER(Kernels)
    best = kernels(c_runtime, None).name
    others = [name for name in (b"avx2", b"neon") if library.nl_kernels(name)]
    assert best == (others[0] if others else b"scalar")
    assert not library.nl_kernels(b"abacus")
