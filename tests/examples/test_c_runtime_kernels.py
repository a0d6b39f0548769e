"""The kernels of the runtime in C against numpy, for every weight format and kind of machine."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.weight_formats.formats import BLOCK_FORMATS
from neuralink_cli.weight_formats.quantising import dequantise
from tests.examples.conftest import CHECKED, FOLDER, LIBRARY, CRuntime, compile_c

# The kinds of kernels.h, first those without blocks.
FORMATS = ("F32", "F16", "BF16", "q8_0", "q4_0", "iq4_nl", "mxfp4")
PLAIN = FORMATS[:3]
INTEGERS = FORMATS[3:6]
ROUNDING = 2.0**-24
_DOT = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
_ADD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p)
_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_FOUR = ctypes.CFUNCTYPE(None, _POINTERS, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
_TILE = ctypes.CFUNCTYPE(None, _POINTERS, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
_NARROW = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)


class Kernels(ctypes.Structure):
    """`NlKernels`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dot", _DOT * len(FORMATS)),
        ("add", _ADD * len(FORMATS)),
        ("dots", _FOUR * len(FORMATS)),
        ("adds", _FOUR * len(FORMATS)),
        ("tile", _TILE * len(PLAIN)),
        ("narrow", _NARROW),
    )


@dataclass(frozen=True)
class Machine:
    """What a kind of machine computes with: its `NlKernels`, and the addresses of all of its `NlIntegers`."""

    library: ctypes.CDLL
    kernels: Any
    integers: tuple[int, ...]


def machine_here(library: ctypes.CDLL, name: str) -> Machine:
    library.nl_kernels.restype = ctypes.POINTER(Kernels)
    library.nl_integers.restype = ctypes.c_void_p
    found = library.nl_kernels(name.encode())
    if not found:
        pytest.skip(f"this machine has no {name}")
    return Machine(library, found.contents, (library.nl_integers(name.encode()),))


EMULATED = ("kernels_avx512", "integers_x86")
EMULATION = Path(__file__).parent / "c_runtime_simde.h"


def emulate(runtime: CRuntime, folder: Path) -> ctypes.CDLL:
    """The library with its kernels for AVX-512 compiled to what a machine without it can run."""
    if not Path("/usr/include/simde").is_dir():
        pytest.skip("there is no SIMDe to emulate AVX-512 with: install libsimde-dev")
    machine_here(runtime.shared_library(), "avx2")
    options = ("-O1", "-fPIC", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f'-DNL_EMULATION="{EMULATION}"')
    objects = [runtime.fast / f"{source.stem}.o" for source in LIBRARY if source.stem not in EMULATED]
    for stem in EMULATED:
        objects.append(folder / f"{stem}.o")
        made = compile_c(objects[-1], [FOLDER / f"{stem}.c"], ("-c", *options))
        assert (made.returncode, made.stderr) == (0, "")
    made = compile_c(folder / "emulated.so", objects, ("-shared",))
    assert (made.returncode, made.stderr) == (0, "")
    return ctypes.CDLL(str(folder / "emulated.so"))


KINDS = ("scalar", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("scalar", "neon")


@pytest.fixture(scope="module", params=KINDS)
def machine(request: pytest.FixtureRequest, c_runtime: CRuntime, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """AVX-512 is emulated where the machine has none."""
    library = c_runtime.shared_library()
    library.nl_kernels.restype = ctypes.c_void_p
    if request.param != "avx512" or library.nl_kernels(b"avx512"):
        return machine_here(library, request.param)
    library = emulate(c_runtime, tmp_path_factory.mktemp("emulated"))
    tables = [ctypes.c_byte.in_dll(library, f"NL_{name}_INTEGERS") for name in ("AVX512", "AVXVNNI")]
    return Machine(library, Kernels.in_dll(library, "NL_AVX512_KERNELS"), tuple(map(ctypes.addressof, tables)))


def random_row(random: np.random.Generator, weights: str, count: int) -> npt.NDArray[np.uint8]:
    """The bytes of a row of weights; of blocks, every code and scales of every size, but finite."""
    if weights not in BLOCK_FORMATS:
        values = random.standard_normal(count) * 10.0 ** random.integers(-6, 3, count)
        if weights == "BF16":
            return (values.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
        return values.astype({"F32": "<f4", "F16": "<f2"}[weights]).view(np.uint8)
    form = BLOCK_FORMATS[weights]
    blocks = random.integers(0, 256, (count // 32, form.block_bytes)).astype(np.uint8)
    if weights == "mxfp4":
        blocks[:, 0] = random.integers(107, 137, len(blocks))
        return blocks.reshape(-1)
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


def pointers(rows: list[npt.NDArray[np.uint8]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(rows))(*map(address, rows))


@pytest.mark.parametrize("weights", FORMATS)
def test_dot_and_add(machine: Machine, weights: str) -> None:
    dot, add = machine.kernels.dot[FORMATS.index(weights)], machine.kernels.add[FORMATS.index(weights)]
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


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("rows_count", [1, 4, 7])
def test_any_number_of_rows_with_any_number_of_vectors(machine: Machine, weights: str, rows_count: int) -> None:
    known, kind, library = machine.kernels, FORMATS.index(weights), machine.library
    random = np.random.default_rng(kind)
    # 8 and more are taken together, 45 not.
    for count in (32, 96, 320) if weights in BLOCK_FORMATS else (8, 24, 45, 320):
        rows = [random_row(random, weights, count) for _ in range(rows_count)]
        weight = np.stack([values_of(row, weights) for row in rows])
        vectors = random.standard_normal((5, count)).astype(np.float32)
        products = np.full((5, rows_count + 1), 7, dtype=np.float32)
        whole = (ctypes.c_uint64(number) for number in (rows_count, count))
        library.nl_products(
            ctypes.byref(known), kind, pointers(rows), *whole, ctypes.c_void_p(address(vectors)),
            *(ctypes.c_uint64(number) for number in (5, count)), ctypes.c_void_p(address(products)),
            *(ctypes.c_uint64(number) for number in (1, rows_count + 1)),
        )  # fmt: skip
        exact = vectors.astype(np.float64) @ weight.T
        bound = (count + 3) * ROUNDING * (abs(vectors).astype(np.float64) @ abs(weight.T)) + 1e-38
        assert (abs(products[:, :-1] - exact) <= bound).all()
        assert (products[:, -1] == 7).all()
        scales = random.standard_normal(rows_count).astype(np.float32)
        sums = np.concatenate((vectors[0], np.full(8, 7, dtype=np.float32)))
        library.nl_adds(
            ctypes.byref(known), kind, pointers(rows), *(ctypes.c_uint64(number) for number in (rows_count, count)),
            ctypes.c_void_p(address(scales)), ctypes.c_void_p(address(sums)),
        )  # fmt: skip
        parts = np.concatenate((vectors[:1], scales[:, None] * weight))
        assert (abs(sums[:count] - parts.sum(axis=0)) <= (rows_count + 3) * ROUNDING * abs(parts).sum(axis=0)).all()
        assert (sums[count:] == 7).all()


def test_float16_is_the_nearest(machine: Machine) -> None:
    random = np.random.default_rng(1)
    values = (random.standard_normal(1003) * 10.0 ** random.integers(-9, 6, 1003)).astype(np.float32)
    values[:5] = (65504, 65519, -65520, 1e30, np.nan)
    halves = np.zeros(1004, dtype="<f2")
    machine.kernels.narrow(address(values), values.size, address(halves))
    expected = np.clip(values, -65504, 65504).astype("<f2")
    assert np.array_equal(halves[:-1], expected, equal_nan=True)
    assert halves[-1] == 0


def test_mxfp4_has_every_scale(machine: Machine) -> None:
    """Also those of which weights are subnormal or infinite."""
    add = machine.kernels.add[FORMATS.index("mxfp4")]
    blocks = np.random.default_rng(4).integers(0, 256, (255, 17)).astype(np.uint8)
    blocks[:, 0] = np.arange(255)
    blocks[:, 1:9] = 0xF7  # the greatest of both signs
    values = np.zeros(255 * 32, dtype=np.float32)
    add(address(blocks), values.size, 1.0, address(values))
    with np.errstate(over="ignore"):
        expected = dequantise(blocks.reshape(1, -1), BLOCK_FORMATS["mxfp4"])[0]
    assert np.isinf(expected).any()
    assert np.array_equal(values, expected)


def rounded(library: ctypes.CDLL, vector: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What the runtime rounds activations to: codes `[blocks, 32]` and scales `[blocks]`."""
    codes = np.zeros((vector.size // 32, 32), dtype=np.int8)
    scales = np.zeros(len(codes), dtype=np.float32)
    places = [ctypes.c_void_p(address(each)) for each in (vector, codes, scales)]
    library.nl_round(places[0], ctypes.c_uint64(vector.size), *places[1:])
    return codes, scales


def test_activations_are_rounded_to_the_nearest_of_255(c_runtime: CRuntime) -> None:
    random = np.random.default_rng(5)
    vector = (random.standard_normal((40, 32)) * 10.0 ** random.integers(-20, 20, (40, 1))).astype(np.float32)
    vector[3] = 0
    vector[4] *= np.float32(1e-25) / abs(vector[4]).max() * np.float32(1e-20)  # beneath what has a scale
    codes, scales = rounded(c_runtime.shared_library(), vector)
    largest = abs(vector).max(axis=1)
    largest[3:5] = 0
    assert np.allclose(scales, largest / 127, rtol=1e-6, atol=0)
    live = largest > 0
    assert (abs(codes[live]).max(axis=1) == 127).all()
    assert (codes[3:5] == 0).all()
    error = abs(codes[live] * scales[live, None].astype(np.float64) - vector[live])
    assert (error <= 0.5001 * scales[live, None]).all()
    for strange in (np.nan, np.inf, -np.inf):
        vector[7, 31] = strange
        codes, scales = rounded(c_runtime.shared_library(), vector)
        assert np.isnan(scales[7])
        assert not np.isnan(np.delete(scales, 7)).any()


def extreme_rows(random: np.random.Generator, weights: str, count: int) -> list[npt.NDArray[np.uint8]]:
    """Six rows, of which four have the most that pairs of products can be: of equal signs and of opposite ones."""
    rows = [random_row(random, weights, count) for _ in range(6)]
    for row, code in zip(rows, (0x80, 0x7F, 0x00, 0xFF), strict=False):
        row.reshape(-1, BLOCK_FORMATS[weights].block_bytes)[:, 2:] = code
    return rows


def integer_products(
    machine: Machine,
    integers: int,
    weights: str,
    rows: list[npt.NDArray[np.uint8]],
    codes: npt.NDArray[Any],
    scales: npt.NDArray[Any],
) -> npt.NDArray[np.float32]:
    """What rows give with rounded activations; room behind them must stay as it is."""
    found = np.full(len(rows) + 1, 7, dtype=np.float32)
    machine.library.nl_integer_dots(
        ctypes.c_void_p(integers), FORMATS.index(weights), pointers(rows),
        *(ctypes.c_uint64(number) for number in (len(rows), codes.size)),
        *(ctypes.c_void_p(address(each)) for each in (codes, scales, found)),
    )  # fmt: skip
    assert found[-1] == 7
    return found[:-1]


@pytest.mark.parametrize("weights", INTEGERS)
def test_integer_products(machine: Machine, weights: str) -> None:
    """Sums of a block are exact integers, of extreme codes too; only the sum over blocks is rounded."""
    form, random = BLOCK_FORMATS[weights], np.random.default_rng(INTEGERS.index(weights))
    for count in (32, 96, 1024):
        rows = extreme_rows(random, weights, count)
        for vector in (random.standard_normal(count), np.ones(count), -np.ones(count)):
            codes, scales = rounded(machine.library, vector.astype(np.float32))
            found = [integer_products(machine, each, weights, rows, codes, scales) for each in machine.integers]
            for k, row in enumerate(rows):
                blocks = row.reshape(-1, form.block_bytes)
                unscaled = blocks.copy()
                unscaled[:, :2] = np.array([1], dtype="<f2").view(np.uint8)
                levels = values_of(unscaled.reshape(-1), weights).reshape(-1, 32)
                by = blocks[:, :2].copy().view("<f2").astype(np.float64)[:, 0] * scales
                parts = by * (levels * codes).sum(axis=1)
                bound = (count // 32 + 12) * ROUNDING * (abs(by) * abs(levels * codes).sum(axis=1)).sum() + 1e-38
                assert all(abs(each[k] - parts.sum()) <= bound for each in found)


@pytest.mark.skipif("avx512" not in KINDS, reason="not a machine with AVX2")
@pytest.mark.parametrize("machine", ["avx512"], indirect=True)
@pytest.mark.parametrize("weights", INTEGERS)
def test_integer_products_of_vnni_are_those_of_avx2_to_the_last_bit(
    c_runtime: CRuntime, machine: Machine, weights: str
) -> None:
    other = machine_here(c_runtime.shared_library(), "avx2")
    random = np.random.default_rng(INTEGERS.index(weights))
    for count in (32, 96, 2048):
        rows = extreme_rows(random, weights, count)
        for vector in (random.standard_normal(count), np.ones(count), random.choice([-1.0, 1.0], count)):
            codes, scales = rounded(machine.library, vector.astype(np.float32))
            expected = integer_products(other, other.integers[0], weights, rows, codes, scales)
            for integers in machine.integers:
                found = integer_products(machine, integers, weights, rows, codes, scales)
                assert found.tobytes() == expected.tobytes()


@pytest.mark.skipif("avx512" not in KINDS, reason="not compilers for x86-64")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compilers_make_instructions_of_avx512(tmp_path: Path, compiler: str) -> None:
    path = shutil.which(compiler)
    if path is None:
        pytest.skip(f"there is no {compiler}")
    sources = [str(FOLDER / f"{stem}.c") for stem in EMULATED]
    made = subprocess.run(
        [path, *CHECKED, "-O1", "-S", *sources], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
    kernels, integers = ((tmp_path / f"{stem}.s").read_text() for stem in EMULATED)
    assert re.search(r"\bvscalefps\s.*%zmm", kernels)
    assert re.search(r"\bvpdpbusd\s.*%ymm", integers)


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")


@pytest.mark.skipif(
    CROSS is None or EMULATOR is None, reason="no aarch64 compiler, or no qemu-user to run what it makes"
)
def test_kernels_of_arm_give_what_any_machine_gives(tmp_path: Path) -> None:
    sources = [FOLDER / f"{stem}.c" for stem in ("kernels", "kernels_neon", "weight_formats", "json", "error")]
    sources += [FOLDER / "integers.c", FOLDER / "integers_neon.c", Path(__file__).parent / "c_runtime_arm.c"]
    command = [str(CROSS), *CHECKED, "-O1", "-static", f"-I{FOLDER}", "-o", str(tmp_path / "arm"), *map(str, sources)]
    made = subprocess.run([*command, "-lm"], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    done = subprocess.run([str(EMULATOR), str(tmp_path / "arm")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "neon\nneon\ndotprod\n")


def test_the_best_kernels_of_the_machine_are_chosen(c_runtime: CRuntime) -> None:
    library = c_runtime.shared_library()
    library.nl_kernels.restype = ctypes.POINTER(Kernels)
    here = [name for name in (b"avx512", b"avx2", b"neon", b"scalar") if library.nl_kernels(name)]
    assert library.nl_kernels(None).contents.name == here[0]
    assert not library.nl_kernels(b"abacus")
