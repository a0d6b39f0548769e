"""How fast the kernels of the runtime in C are, set by set: rows of every format times a vector, from the cache.

python benchmarks/c_kernels.py

Compiles examples/c_runtime with cc. Rows are few enough to stay in the second-level cache: what is measured is
computing, not memory. Sets of kernels take turns, and the best of all turns counts. "int8" are activations rounded to 8
bits (`--activations int8`).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SOURCES = Path(__file__).parent.parent / "examples" / "c_runtime"
# Kinds of `kernels.h` in their order, and bytes of 32 weights.
FORMATS = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18, "iq4_nl": 18}
ROUNDED = ("q8_0", "q4_0", "iq4_nl")
SETS = (b"scalar", b"avx2", b"avx512", b"neon")
SECONDS = 0.02


def compile_library(folder: Path) -> ctypes.CDLL:
    sources = [path for path in SOURCES.glob("*.c") if not path.name.startswith(("flash_", "embed"))]
    library = folder / "libneuralink.so"
    options = ("-std=c11", "-O3", "-fPIC", "-shared", "-pthread")
    subprocess.run(["cc", *options, "-o", str(library), *map(str, sources), "-lm"], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("nl_kernels", "nl_integers"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_void_p
    return loaded


def weights_a_nanosecond(run: Callable[[], object], weights: int) -> float:
    """The speed of one turn."""
    count, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < SECONDS:
        run()
        count += 1
    return weights * count / taken / 1e9


def contenders(library: ctypes.CDLL, rows: int, count: int) -> dict[tuple[str, bytes], Callable[[], object]]:
    """By format and set: a product of all rows with a vector. The memory that they use belongs to them."""
    random = np.random.default_rng(0)
    values = random.standard_normal(count).astype(np.float32)
    codes = np.empty(count, np.int8)
    scales, sums = np.empty(count // 32, np.float32), np.empty(rows, np.float32)
    library.nl_round(at(values), ctypes.c_uint64(count), at(codes), at(scales))
    found: dict[tuple[str, bytes], Callable[[], object]] = {}
    for kind, (name, block_bytes) in enumerate(FORMATS.items()):
        data = rows_of(name, random.standard_normal((rows, count), dtype=np.float32), block_bytes)
        places = (ctypes.c_void_p * rows)(*(data.ctypes.data + row * data.shape[1] for row in range(rows)))
        size = (ctypes.c_uint64(rows), ctypes.c_uint64(count))
        for kernels in SETS:
            kept = (data, values, codes, scales, sums)
            if pointer := library.nl_kernels(kernels):
                with_values = (ctypes.c_void_p(pointer), kind, places, *size, at(values), at(sums))
                found[name, kernels] = bound(library.nl_dots, with_values, kept)
            if name in ROUNDED and (pointer := library.nl_integers(kernels)):
                with_codes = (ctypes.c_void_p(pointer), kind, places, *size, at(codes), at(scales), at(sums))
                found[f"{name}, int8", kernels] = bound(library.nl_integer_dots, with_codes, kept)
    return found


def rows_of(name: str, weights: npt.NDArray[np.float32], block_bytes: int) -> npt.NDArray[np.uint8]:
    """The weights in a format without blocks; of a format with blocks, codes of any kind with scales near 0.01."""
    if name == "f32":
        return weights.view(np.uint8)
    if name == "f16":
        return weights.astype(np.float16).view(np.uint8)
    if name == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = weights.shape[1] // 32
    codes = np.random.default_rng(1).integers(0, 256, (weights.shape[0], blocks, block_bytes), dtype=np.uint8)
    codes[:, :, :2] = np.array([0.01], np.float16).view(np.uint8)
    return codes.reshape(weights.shape[0], -1)


def at(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def bound(function: Callable[..., object], arguments: tuple[object, ...], kept: object) -> Callable[[], object]:
    """A call with arguments, and what they point to."""

    def call(_: object = kept) -> object:
        return function(*arguments)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--weights", type=int, default=4096, help="of a row, a multiple of 32")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(compile_library(Path(folder)), options.rows, options.weights)
        best = dict.fromkeys(runs, 0.0)
        for _ in range(options.turns):
            for key, run in runs.items():
                best[key] = max(best[key], weights_a_nanosecond(run, options.rows * options.weights))
    sets = [kernels for kernels in SETS if any(key[1] == kernels for key in best)]
    print("weights a nanosecond, one thread; in brackets, times as fast as the set before")
    print(f"{'rows':<14}" + "".join(f"{kernels.decode():>16}" for kernels in sets))
    for name in dict.fromkeys(key[0] for key in best):
        line, before = f"{name:<14}", None
        for kernels in sets:
            speed = best.get((name, kernels))
            text = "" if speed is None else f"{speed:.2f}" + (f" ({speed / before:.2f})" if before else "")
            line, before = f"{line}{text:>16}", speed
        print(line)


if __name__ == "__main__":
    main()
