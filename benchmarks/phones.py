"""The bench table on a modelled phone, with bundles scaled to the sizes of larger models.

python benchmarks/phones.py wiki.trace.safetensors --transfer alpaca.trace.safetensors

For each bundle size the neurons are linked and refined on the first 80 % of the first trace's tokens, as `neuralink
cluster` does, and replayed on the rest of them, and on the held-out tokens of the other traces.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from neuralink_cli.bench.bench import BenchOptions, BenchReport, BenchRow, bench_layouts
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from neuralink_cli.storage.budget import parse_budget


@contextlib.contextmanager
def silent(_stage: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], object]]:
    yield lambda _count: None


def place(trace: Path, folder: Path, order: str, device: str, size: int, effort: str) -> Path:
    """A placement of this order, made for bundles of this size."""
    output = folder / f"{order}-{size}.placement.safetensors"
    options = ClusterOptions(find_device(device), order=order, bundle_bytes=size, effort=effort)
    cluster(trace, output, options, progress=silent)
    return output


def print_table(title: str, sizes: list[int], reports: list[BenchReport]) -> None:
    print(f"\n{title}: mean I/O time in ms, reads per token, gain over bundles in original order without collapse")
    print(f"{'':24}" + "".join(f"{f'{size // 1024} KiB':>22}" for size in sizes))
    cache = None
    for rows in zip(*(report.rows for report in reports), strict=True):
        way = rows[0].way
        if way.cache != cache:
            cache = way.cache
            share = rows[0].capacity
            print("no cache" if cache == "none" else f"cache {cache} of {share:,} neurons")
        label = "    + collapse" if way.collapse else f"  {way.name}"
        print(f"{label:24}" + "".join(f"{cell(row):>22}" for row in rows))


def cell(row: BenchRow) -> str:
    return f"{1000 * row.figures.io_mean:8.2f} {row.figures.reads:7.1f} {row.gain_over_naive.value:5.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--transfer", type=Path, nargs="*", default=[], help="traces of the same model on other text")
    parser.add_argument("--device", default="ufs4.0")
    parser.add_argument("--bundle-bytes", type=int, nargs="+", default=[4096, 8192, 16384, 24576])
    parser.add_argument("--dram", default="5%")
    parser.add_argument("--cache", default="linked-s3fifo")
    parser.add_argument("--effort", default="normal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = {
            size: [
                place(options.trace, Path(folder), order, options.device, size, options.effort)
                for order in ("linked", "refined")
            ]
            for size in options.bundle_bytes
        }
        for trace in (options.trace, *options.transfer):
            reports = []
            for size, placements in made.items():
                replay = BenchOptions(
                    devices=(find_device(options.device),),
                    dram=parse_budget(options.dram),
                    policy=options.cache,
                    bundle_bytes=(size,),
                )
                reports.append(bench_layouts(placements, trace, replay, progress=silent))
            tokens = sum(part.tokens for part in reports[0].tokens)
            print_table(f"{trace.name}, {tokens:,} tokens, {options.device}", options.bundle_bytes, reports)


if __name__ == "__main__":
    main()
