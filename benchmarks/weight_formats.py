"""What quantising costs on the way into bundles, beside copying the same source, on one core of one process.

Also the error of each format on Gaussian weights, relative to the weights. Bundles have three parts, of which one is
written. The fastest of some rounds counts; in each round, all kinds have their turn.

python benchmarks/weight_formats.py --neurons 11008 --hidden 4096
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from neuralink_cli.architectures.regions import Region
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.layout.bundling import gather_part
from neuralink_cli.weight_formats.formats import IQ4_NL, NEAREST, Q4_0, Q8_0, SEARCH, BlockFormat
from neuralink_cli.weight_formats.quantising import dequantise, gather_quantised

KINDS = ((Q8_0, NEAREST), (Q8_0, SEARCH), (Q4_0, NEAREST), (Q4_0, SEARCH), (IQ4_NL, SEARCH))
PARTS = 3


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of this thread, which other load on the machine lengthens less than wall time."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def quantise_into(
    data: Bytes, region: Region, slots: Order, weight_format: BlockFormat, rounding: str, bundles: Bytes, part: int
) -> None:
    bad = gather_quantised(data, region, 0, slots, "F16", weight_format, bundles, PARTS * part, part, rounding=rounding)
    assert bad is None


def relative_error(bundles: Bytes, part: int, weight_format: BlockFormat, rows: np.ndarray, slots: Order) -> float:
    """Root of the mean squared error over that of the weights, of some rows of a matrix."""
    stored = bundles.reshape(-1, PARTS * part)[slots[: len(rows)], part : 2 * part]
    miss = dequantise(stored, weight_format).astype(np.float64) - rows
    return float(np.sqrt((miss**2).sum() / (rows.astype(np.float64) ** 2).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    n, hidden = options.neurons, options.hidden
    random = np.random.default_rng(options.seed)
    slots = random.permutation(n).astype(np.int32)
    print(f"{n:,} neurons, hidden {hidden:,}, float16, {2 * n * hidden / 1e6:.0f} MB")
    print(f"GB/s of source, on one core, fastest of {options.rounds} rounds\n")
    print(f"{'neurons are':12} {'what':18} {'GB/s':>6} {'copies':>7} {'error':>8}")
    for axis, name in ((0, "rows"), (1, "columns")):
        matrix = (random.standard_normal((n, hidden) if axis == 0 else (hidden, n), np.float32) * 0.02).astype(
            np.float16
        )
        data = matrix.reshape(-1).view(np.uint8)
        region = Region("", axis, 0, matrix.shape[1] * 2, matrix.shape[0], matrix.shape[1] * 2)
        copy, gathered = np.zeros_like(data), np.zeros(data.size * PARTS, np.uint8)
        made = {kind: np.zeros(n * PARTS * kind[0].row_bytes(hidden), np.uint8) for kind in KINDS}
        runs: dict[str, Callable[[], object]] = {
            "np.copyto": partial(np.copyto, copy, data),
            "gather_part": partial(gather_part, data, region, 0, slots, 2, gathered, PARTS * hidden * 2, 0),
        }
        errors = {}
        for kind, bundles in made.items():
            part = kind[0].row_bytes(hidden)
            label = " ".join((kind[0].name, kind[1]))
            runs[label] = partial(quantise_into, data, region, slots, *kind, bundles, part)
            # The first run compiles.
            runs[label]()
            rows = (matrix if axis == 0 else matrix.T)[:256].astype(np.float32)
            errors[label] = relative_error(bundles, part, kind[0], rows, slots)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(options.rounds):
            for label, run in runs.items():
                best[label] = min(best[label], seconds(run))
        for label, least in best.items():
            error = f"{100 * errors[label]:7.3f}%" if label in errors else ""
            print(f"{name:12} {label:18} {data.size / least / 1e9:6.2f} {least / best['np.copyto']:6.1f}x {error:>8}")


if __name__ == "__main__":
    main()
