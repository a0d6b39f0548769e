"""Co-activation counting against numpy's float32 product and scipy's sparse product, in one process.

python benchmarks/counting.py --neurons 11008 --tokens 32768
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.ordering.counting import coactivation_counts
from neuralink_cli.ordering.partners import strongest_links
from neuralink_cli.placement.bits import activation_counts, transpose_bits


@dataclass
class Measurement:
    """The fastest of some runs."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """What the process grew by at most, beyond what it held before; 0 where the system does not tell."""
    result: Any


def clustered_activations(neurons: int, tokens: int, active: float, seed: int) -> npt.NDArray[np.uint8]:
    """A trace of neurons with long-tailed rates, in clusters of about 64 that are on or off together.

    Returns:
        uint8[tokens, ceil(neurons/8)], with about a share of `active` bits set.
    """
    rng = np.random.default_rng(seed)
    clusters = max(neurons // 64, 1)
    cluster = rng.integers(0, clusters, neurons)
    rate = rng.lognormal(0, 1.2, neurons)
    rate = np.minimum(rate * active * 1.25 / rate.mean(), 0.95)
    fired = np.empty((tokens, -(-neurons // 8)), dtype=np.uint8)
    for first in range(0, tokens, 256):
        part = fired[first : first + 256]
        on = rng.gamma(0.3, 1 / 0.3, (len(part), clusters))
        part[:] = np.packbits(rng.random((len(part), neurons)) < rate * on[:, cluster], axis=1, bitorder="little")
    return fired


def measure(function: Callable[[], Any], repeat: int = 1) -> Measurement:
    """Run `function` `repeat` times and keep the shortest times and the highest peak."""
    measured = Measurement(float("inf"), float("inf"), 0, None)
    for _ in range(repeat):
        measured.result = None
        gc.collect()
        before = _restart_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        measured.result = function()
        measured.seconds = min(measured.seconds, time.perf_counter() - wall)
        measured.cpu_seconds = min(measured.cpu_seconds, time.process_time() - cpu)
        measured.peak_bytes = max(measured.peak_bytes, _memory("VmHWM") - before)
    return measured


def print_row(name: str, measured: Measurement, *columns: str) -> None:
    """Print one line of a table: name, seconds, CPU seconds, MiB, and whatever else."""
    times = f"{measured.seconds:9.3f} {measured.cpu_seconds:9.3f} {measured.peak_bytes / 2**20:9.0f}"
    print(f"{name:38} {times} " + " ".join(f"{column:>12}" for column in columns), flush=True)


def print_header(*columns: str) -> None:
    """Print the headings of what `print_row` prints."""
    print(f"{'':38} {'wall s':>9} {'CPU s':>9} {'peak MiB':>9} " + " ".join(f"{column:>12}" for column in columns))


def _restart_peak() -> int:
    """Let the peak of the resident memory start from now, where Linux allows it; return the memory now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _memory("VmHWM")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))


def _blas() -> str:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "BLAS kernel unknown: threadpoolctl is not installed"
    return ", ".join(
        f"{library['internal_api']} {library.get('architecture', '')} x{library['num_threads']}"
        for library in threadpool_info()
        if library["user_api"] == "blas"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--active", type=float, default=0.07, help="share of neurons that fire")
    parser.add_argument("--sparse-tokens", type=int, default=1024, help="tokens for scipy.sparse, whose time is linear")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each of ours, of which the fastest counts")
    parser.add_argument("--skip-numpy", action="store_true")
    options = parser.parse_args()
    n, tokens = options.neurons, options.tokens

    warm = transpose_bits(np.ones((64, 1), dtype=np.uint8), 8)
    coactivation_counts(warm)
    strongest_links(warm, 1)
    fired = clustered_activations(n, tokens, options.active, options.seed)
    operations = n * (n + 1) / 2 * tokens
    transposed = measure(lambda: transpose_bits(fired, n), options.repeat)
    bits = transposed.result
    share = activation_counts(bits).sum() / max(n * tokens, 1)
    print(f"{n} neurons, {tokens} tokens, {100 * share:.1f} % active; {_blas()}")
    print("T op/s: pairs of bits compared, the upper triangle only, per second of wall time\n")
    print_header("T op/s", "x slower")
    print_row("transpose_bits", transposed, f"{fired.nbytes / transposed.seconds / 1e9:.2f} GB/s")
    ours = measure(lambda: coactivation_counts(bits), options.repeat)
    counts = ours.result

    def row(name: str, measured: Measurement, scale: float = 1.0) -> None:
        seconds = measured.seconds * scale
        print_row(name, measured, f"{operations / seconds / 1e12:.2f}", f"{seconds / ours.seconds:.1f}")

    row("coactivation_counts", ours)
    row("strongest_links, 32 per neuron", measure(lambda: strongest_links(bits, 32), options.repeat))
    if not options.skip_numpy:
        dense = np.unpackbits(fired, axis=1, count=n, bitorder="little").astype(np.float32)
        product = measure(lambda: dense.T @ dense)
        row("numpy float32 A.T @ A", product)
        for i in range(0, n, 512):
            assert np.array_equal(np.triu(product.result[i : i + 512], i), counts[i : i + 512])
        del dense, product
    try:
        from scipy import sparse
    except ImportError:
        return
    part = min(options.sparse_tokens, tokens)
    unpacked = np.unpackbits(fired[:part], axis=1, count=n, bitorder="little")
    matrix = sparse.csr_array(unpacked.astype(np.int32))
    transpose = matrix.T.tocsr()
    row(f"scipy.sparse A.T @ A, {part} tokens*", measure(lambda: transpose @ matrix), tokens / part)
    print(f"\n* op/s and ratio as if its time grew linearly to {tokens} tokens")


if __name__ == "__main__":
    main()
