"""The whole of a synthetic 7B trace through `neuralink cluster`, as whole processes, with their peak memory.

python benchmarks/cluster_7b.py --folder /tmp          # 32 blocks x 11,008 neurons x 32,768 tokens, 1.4 GB on disk
python benchmarks/cluster_7b.py --folder /tmp --run "--order linked" --report     # and `report` on what it wrote
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from synthetic import write_synthetic_trace


def run(*arguments: str) -> tuple[float, float, float, int]:
    """Wall seconds, CPU seconds, peak resident MiB and exit code of `neuralink` with these arguments."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "neuralink_cli", *arguments, "-q"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--active", type=float, default=0.1, help="share of neurons that fire")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the trace is written")
    parser.add_argument("--run", action="append", help="options of a run, e.g. '--order linked'; may be repeated")
    parser.add_argument("--report", action="store_true", help="also run `report` on the last placement")
    options = parser.parse_args()
    trace = options.folder / "synthetic.trace.safetensors"
    placement = options.folder / "synthetic.placement.safetensors"
    write_synthetic_trace(
        trace, blocks=options.blocks, neurons=options.neurons, tokens=options.tokens, hidden=4096, active=options.active
    )
    shape = f"{options.blocks} blocks x {options.neurons} neurons x {options.tokens} tokens"
    print(f"{shape}, {options.active:.0%} active, {os.cpu_count()} CPUs")
    print(f"{'neuralink cluster':40} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9} {'s/block':>8}")
    for arguments in options.run or ["--order linked", "--order refined"]:
        seconds, cpu, peak, code = run("cluster", str(trace), "-o", str(placement), "--overwrite", *arguments.split())
        result = "" if code == 0 else f"  exit code {code}"
        print(
            f"{arguments:40} {seconds:8.1f} {cpu:8.1f} {peak:9.0f} {seconds / options.blocks:8.2f}{result}", flush=True
        )
    if options.report:
        page = options.folder / "synthetic.html"
        seconds, cpu, peak, code = run("report", str(placement), "--trace", str(trace), "-o", str(page), "--overwrite")
        size = f"  {page.stat().st_size / 1e6:.1f} MB" if code == 0 else f"  exit code {code}"
        print(f"{'neuralink report':40} {seconds:8.1f} {cpu:8.1f} {peak:9.0f} {'':8}{size}", flush=True)
        page.unlink(missing_ok=True)
    trace.unlink()
    placement.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
