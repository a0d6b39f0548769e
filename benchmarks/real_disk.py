"""What the order is worth on the disk at hand: a large layout, read with direct I/O by `neuralink bench --real`.

python benchmarks/real_disk.py --folder /on/the/disk        # 1.6 GB of random weights, and as much for the layout

The weights are random and the activations synthetic (clustered, spread over each block): what is measured is the
storage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

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


def neuralink(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "neuralink_cli", *map(str, arguments), "-q"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096, help="of the trace")
    parser.add_argument("--replayed", type=int, default=30, help="tokens that are really read")
    parser.add_argument("--active", type=float, default=0.05)
    parser.add_argument("--device", default="nvme", help="that the order is made for")
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
        neuralink("cluster", work / "trace", "-o", work / "placement", "--device", options.device, "--effort", "fast")
        neuralink("relayout", work / "model", "--placement", work / "placement", "-o", work / "flash")
        neuralink("bench", work / "flash", "--trace", work / "trace", "--real", "--tokens", options.replayed)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
