"""`cluster` on Dask: what a second worker gains on a synthetic 7B trace, and the memory of all processes on a 70B one.

python benchmarks/cluster_on_dask.py --folder /tmp              # 4 blocks of 11,008, then 80 blocks of 28,672 neurons
python benchmarks/cluster_on_dask.py --folder /tmp --blocks 2 --tokens 4096 --large-blocks 4 --order linked

In each round every way takes its turn on the same trace, and placements must be the same bytes. For the second table a
scheduler and two workers are started as programs, as on a cluster, so that each has a peak of its own. Linux only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from synthetic import write_synthetic_trace

_PROGRAMS = {"scheduler": "distributed.cli.dask_scheduler", "worker": "distributed.cli.dask_worker"}


def peak(pid: int) -> float:
    """The peak resident MiB of a process so far; 0 if it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def cluster(trace: Path, output: Path, *options: str, watch: Mapping[str, int]) -> tuple[float, dict[str, float]]:
    """Wall seconds of `neuralink cluster`, and the peak MiB of it, of its largest child and of other processes."""
    command = [sys.executable, "-m", "neuralink_cli", "cluster", str(trace), "-o", str(output), "--overwrite", "-q"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    peaks = dict.fromkeys(("client", "child", *watch), 0.0)
    while process.poll() is None:
        now = {"client": peak(process.pid), **{name: peak(pid) for name, pid in watch.items()}}
        now["child"] = max(map(peak, children(process.pid)), default=0.0)
        peaks = {name: max(peaks[name], now[name]) for name in peaks}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"cluster {options} failed")
    return time.perf_counter() - started, peaks


@contextmanager
def running(program: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of Dask."""
    code = f"from {_PROGRAMS[program]} import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def speed(options: argparse.Namespace, folder: Path) -> None:
    """What one and two workers take, beside one process that orders a block at a time."""
    trace = folder / "trace"
    shape = {"blocks": options.blocks, "neurons": options.neurons, "tokens": options.tokens}
    write_synthetic_trace(trace, **shape, hidden=4096, active=options.active)
    ways = {"one process": ("--jobs", "1"), "1 worker": ("--workers", "1"), "2 workers": ("--workers", "2")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, dict[str, float]] = {}
    made = set()
    for _ in range(options.rounds):
        for name, arguments in ways.items():
            taken, peaks[name] = cluster(trace, folder / "p", "--order", options.order, *arguments, watch={})
            seconds[name].append(taken)
            made.add((folder / "p").read_bytes())
    if len(made) != 1:
        raise SystemExit("placements differ")
    print(f"{options.blocks} blocks x {options.neurons} neurons x {options.tokens} tokens, --order {options.order}")
    print(f"{'':14}{'wall s':>9}{'speed-up':>10}{'client MiB':>12}{'worker MiB':>12}")
    base = statistics.median(seconds["1 worker"])
    for name in ways:
        wall = statistics.median(seconds[name])
        mine, child = peaks[name]["client"], peaks[name]["child"]
        print(f"{name:14}{wall:9.1f}{base / wall:10.2f}{mine:12.0f}{f'{child:.0f}' if child else '-':>12}", flush=True)


def memory(options: argparse.Namespace, folder: Path) -> None:
    """The peak of every process on a trace with the shape of a larger model."""
    trace, address = folder / "trace", folder / "scheduler.json"
    shape = {"blocks": options.large_blocks, "neurons": options.large_neurons, "tokens": options.large_tokens}
    write_synthetic_trace(trace, **shape, hidden=8192, active=options.active)
    with ExitStack() as stack:
        file = ("--scheduler-file", str(address))
        watch = {"scheduler": stack.enter_context(running("scheduler", *file, "--no-dashboard", "--port", "0")).pid}
        quiet = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
        for name in ("worker 1", "worker 2"):
            watch[name] = stack.enter_context(running("worker", *file, *quiet, "--local-directory", str(folder))).pid
        while not address.exists():
            time.sleep(0.1)
        print(
            f"{options.large_blocks} blocks x {options.large_neurons} neurons x {options.large_tokens} tokens, linked"
        )
        print(f"{'peak MiB':14}{'wall s':>9}{'client':>10}{'scheduler':>11}{'worker 1':>10}{'worker 2':>10}")
        for name, sent in (("shared path", ()), ("--send-trace", ("--send-trace",))):
            arguments = ("--order", "linked", "--scheduler", str(address), *sent)
            wall, peaks = cluster(trace, folder / "p", *arguments, watch=watch)
            cells = "".join(
                f"{peaks[of]:{width}.0f}" for of, width in zip(("client", *watch), (10, 11, 10, 10), strict=True)
            )
            print(f"{name:14}{wall:9.1f}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--order", default="refined")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large-blocks", type=int, default=80, help="0: leave the larger model out")
    parser.add_argument("--large-neurons", type=int, default=28672)
    parser.add_argument("--large-tokens", type=int, default=2048)
    parser.add_argument("--active", type=float, default=0.1, help="share of neurons that fire")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where traces are written")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if options.blocks:
            speed(options, folder)
        if options.large_blocks:
            memory(options, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
