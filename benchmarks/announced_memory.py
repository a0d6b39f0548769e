"""What commands say that they take of memory, beside what they take: on a random model of the Llama shape.

python benchmarks/announced_memory.py --folder /on/the/disk                  # 1.1 billion weights: 7 GB of both
python benchmarks/announced_memory.py --folder /on/the/disk --shape tiny

One command after the other, each a process of its own. The peak is that of its resident memory as the system counts it.
Linux only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from llama_shape import SHAPES, random_text, write_checkpoint

from neuralink_cli.sizes import human_bytes, parse_size

_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
_SAID = re.compile(r"(?:needs up to|takes about) ([0-9.]+ [kMG]?B) of memory")


def measure(arguments: tuple[object, ...], log: Path) -> tuple[int, int, float]:
    """Bytes that a command announces, bytes that it takes, and its seconds."""
    started, peak = time.perf_counter(), 0
    with log.open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "neuralink_cli", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=said
        )
        # Not the system's own account of the process: that starts with the memory of this one.
        while process.poll() is None:
            found = _PEAK.search(Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, 1024 * int(found[1]) if found else 0)
            time.sleep(0.01)
    announced = _SAID.search(log.read_text())
    if process.returncode or announced is None:
        raise SystemExit(f"{arguments} failed:\n{log.read_text()}")
    return parse_size(announced[1]), peak, time.perf_counter() - started


def commands(work: Path, tokens: int) -> dict[str, tuple[object, ...]]:
    """By what is measured, the arguments of the commands."""
    trace, placement = work / "trace", work / "placement"
    text = ("--dataset", work / "text.txt", "--num-samples", 0, "--max-tokens", tokens, "--batch-size", 2)
    rounded = ("--weights", "q4_0")
    return {
        "profile": ("profile", work / "model", *text, "--active-ratio", 0.12, "-o", trace),
        "cluster": ("cluster", trace, "--effort", "fast", "-o", placement),
        "bench": ("bench", placement, "--trace", trace),
        "relayout": ("relayout", work / "model", "--placement", placement, "--resident", "gate", "-o", work / "flash"),
        "verify": ("verify", work / "model", work / "flash"),
        "run": ("run", work / "flash", "--prompt", "w1 w2 w3 w4 w5 w6 w7 w8", "--max-new-tokens", 8, "--dram", "20%"),
        "restore": ("restore", work / "flash", "-o", work / "restored"),
        "relayout --weights q4_0": (
            "relayout",
            work / "model",
            "--placement",
            placement,
            "-o",
            work / "q4_0",
            *rounded,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to use")
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--tokens", type=int, default=2048, help="to profile")
    options = parser.parse_args()
    work, shape = options.folder.absolute() / "neuralink-announced", SHAPES[options.shape]
    shutil.rmtree(work, ignore_errors=True)
    try:
        write_checkpoint(work / "model", shape)
        (work / "text.txt").write_text(random_text(shape, 2 * options.tokens, seed=1))
        print(f"{'':26} {'s':>7} {'announced':>10} {'peak':>10} {'ratio':>6}", flush=True)
        for name, arguments in commands(work, options.tokens).items():
            announced, peak, seconds = measure(arguments, work / "log")
            sizes = f"{human_bytes(announced):>10} {human_bytes(peak):>10} {announced / peak:6.2f}"
            print(f"{name:26} {seconds:7.1f} {sizes}", flush=True)
            shutil.rmtree(work / "restored", ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
