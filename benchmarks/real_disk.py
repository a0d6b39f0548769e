"""What the order is worth on the disk at hand, measured and modelled: a large layout, read with direct I/O.

python benchmarks/real_disk.py --folder /on/the/disk        # 1.6 GB of random weights, and as much for the layout

The disk is probed, an order is made for the profile, and `neuralink bench` replays the same tokens twice: on the
model of the disk, and with `--real`. Storage that others use too is another one a minute later, so that the disk is
probed again in each of some rounds; the table has medians. The weights are random and the activations synthetic
(clustered, spread over each block): what is measured is the storage, and how far the model of it can be trusted.
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

import numpy as np
from synthetic import write_synthetic_trace

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files.header import build_header


def write_checkpoint(folder: Path, *, layers: int, neurons: int, hidden: int) -> str:
    """An OPT-shaped checkpoint of FFN weights alone, in float16; returns its fingerprint."""
    folder.mkdir(parents=True)
    config = {"model_type": "opt", "num_hidden_layers": layers, "activation_function": "relu"}
    (folder / "config.json").write_text(json.dumps(config))
    specs = [
        (f"model.decoder.layers.{layer}.{name}.weight", "F16", shape)
        for layer in range(layers)
        for name, shape in (("fc1", (neurons, hidden)), ("fc2", (hidden, neurons)))
    ]
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(build_header(specs, {}).prelude)
        for _ in specs:
            file.write(rng.bytes(neurons * hidden * 2))
    with Checkpoint(folder) as checkpoint:
        return checkpoint.fingerprint


def neuralink(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "neuralink_cli", *map(str, arguments), "-q", "--json"]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def compare(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Print times and gains of every way to read, as the model of a round has them and as they were in it: medians."""
    print(f"medians of {len(rounds)} rounds; off: modelled gain over measured gain, with the least and the most")
    print("gain: over naive reading (original order, no gap read across, same cache), modelled and measured")
    print(f"{'order':<12}{'collapse':<10}{'cache':<15}{'model ms':>10}{'disk ms':>10}{'model':>7}{'disk':>7}{'off':>6}")
    ways = zip(*([*zip(*(report["rows"] for report in each), strict=True)] for each in rounds), strict=True)
    for way in ways:
        # By modelled and measured, of each round.
        gains = [[pair[side]["gain_over_naive"]["value"] for pair in way] for side in (0, 1)]
        times = [[1e3 * pair[side]["figures"]["io_mean"] for pair in way] for side in (0, 1)]
        kind = way[0][1]["way"]
        off = [modelled / measured - 1 for modelled, measured in zip(*gains, strict=True)]
        print(
            f"{kind['name']:<12}{'yes' if kind['collapse'] else 'no':<10}{kind['cache']:<15}"
            f"{statistics.median(times[0]):>10.2f}{statistics.median(times[1]):>10.2f}"
            f"{statistics.median(gains[0]):>7.2f}{statistics.median(gains[1]):>7.2f}"
            f"{statistics.median(off):>6.0%} ({min(off):.0%} to {max(off):.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096, help="of the trace")
    parser.add_argument("--replayed", type=int, default=30, help="tokens that are really read")
    parser.add_argument("--active", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    work = options.folder / "neuralink-real-disk"
    shutil.rmtree(work, ignore_errors=True)
    try:
        shape = {"neurons": options.neurons, "hidden": options.hidden}
        fingerprint = write_checkpoint(work / "model", layers=options.layers, **shape)
        write_synthetic_trace(
            work / "trace",
            blocks=options.layers,
            tokens=options.tokens,
            active=options.active,
            model_type="opt",
            fingerprint=fingerprint,
            **shape,
        )
        device = work / "disk.json"
        neuralink("probe", work, "-o", device)
        neuralink("cluster", work / "trace", "-o", work / "placement", "--device", device, "--effort", "fast")
        neuralink("relayout", work / "model", "--placement", work / "placement", "-o", work / "flash")
        bench = ("bench", work / "flash", "--trace", work / "trace", "--tokens", options.replayed, "--device", device)
        rounds = []
        for _ in range(options.rounds):
            neuralink("probe", work, "-o", device, "--overwrite")
            rounds.append((neuralink(*bench), neuralink(*bench, "--real")))
        compare(rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
