"""`neuralink run` on the layouts of one model in every weight format: speed, and memory as planned and as measured.

python benchmarks/run_formats.py --folder /on/the/disk                  # 1.1 billion weights: 10 GB of disk
python benchmarks/run_formats.py --folder /on/the/disk --shape tiny

A random model of the Llama shape, of which 12 % fire. Runs take turns, each a process of its own; the first tokens fill
the cache. Least memory: `--dtype auto` computes in the dtype that the other weights are stored in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_shape import SHAPES, random_text, write_checkpoint

from neuralink_cli.sizes import human_bytes

FORMATS = ("source", "q8_0", "q4_0", "iq4_nl")


def neuralink(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "neuralink_cli", *map(str, arguments), "-q", "--json"]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def make_layouts(work: Path, shape: str) -> None:
    """One layout in each format, all in the same order."""
    write_checkpoint(work / "model", SHAPES[shape])
    (work / "text.txt").write_text(random_text(SHAPES[shape], 4096, seed=1))
    trace, placement = work / "trace", work / "placement"
    text = ("--dataset", work / "text.txt", "--num-samples", 0, "--max-tokens", 2048)
    neuralink("profile", work / "model", *text, "--active-ratio", 0.12, "-o", trace)
    neuralink("cluster", trace, "--resident", "gate", "--effort", "fast", "-o", placement)
    for kind in FORMATS:
        made = ("--placement", placement, "--resident", "gate", "--weights", kind, "-o", work / kind)
        neuralink("relayout", work / "model", *made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to use")
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--tokens", type=int, default=32, help="new ones, of each run")
    parser.add_argument("--dram", default="20%")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    work = options.folder.absolute() / "neuralink-run-formats"
    shutil.rmtree(work, ignore_errors=True)
    try:
        make_layouts(work, options.shape)
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FORMATS}
        words = ("--prompt", " ".join(f"w{k}" for k in range(1, 17)), "--max-new-tokens", options.tokens)
        for _ in range(options.rounds):
            for kind in FORMATS:
                found[kind].append(neuralink("run", work / kind, *words, "--dram", options.dram, "--dtype", "auto"))
        print(f"{'weights':10} {'in flash':>9} {'tokens/s':>9} {'planned':>9} {'measured':>9} {'off':>8}")
        for kind, runs in found.items():
            speed = statistics.median(run["tokens"]["tokens"] / run["tokens"]["seconds"] for run in runs)
            planned, peak = (max(run["dram"][key] for run in runs) for key in ("planned_bytes", "peak_bytes"))
            sizes = [human_bytes(size) for size in (runs[0]["dram"]["flash_bytes"], planned, peak)]
            off = ("-" if peak < planned else "") + human_bytes(abs(peak - planned))
            print(f"{kind:10} {sizes[0]:>9} {speed:9.1f} {sizes[1]:>9} {sizes[2]:>9} {off:>8}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
