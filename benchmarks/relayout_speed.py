"""`neuralink relayout` against `cp` and fsync, `neuralink verify` against reading both sides once, with peak memory.

python benchmarks/relayout_speed.py --folder /on/the/disk                    # 2 GB of weights; needs 3 times that
python benchmarks/relayout_speed.py --folder /on/the/disk --gigabytes 13.5   # Llama 2 7B
python benchmarks/relayout_speed.py --folder /on/the/disk --weights q4_0     # rounded on the way

The weights are random numbers in the shape of Llama 2 7B with fewer or more layers, the order is random too: it decides
nothing here. Before every run the files that it reads are dropped from the page cache. The runs take turns; each is a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.calibration.digests import DIGEST_BYTES
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import SHARD_INDEX
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.files.header import build_header, tensor_bytes
from neuralink_cli.placement.placement import (
    HeldOutReads,
    OrderCost,
    PlacedBlock,
    PlacementBlock,
    PlacementHeader,
    write_placement,
)

SHARD_BYTES = 5_000_000_000
PIECE = 1 << 26
# Leaves out an exponent bit of every float16: what remains is finite, and below 2.
FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)

TensorSpec = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What makes the size of a Llama."""

    layers: int
    hidden: int = 4096
    neurons: int = 11008
    vocabulary: int = 32000

    def tensors(self) -> list[TensorSpec]:
        """All tensors in the order in which transformers saves them."""
        square, wide = (self.hidden, self.hidden), (self.neurons, self.hidden)
        specs: list[TensorSpec] = [("model.embed_tokens.weight", "F16", (self.vocabulary, self.hidden))]
        for layer in range(self.layers):
            stem = f"model.layers.{layer}."
            specs.append((f"{stem}input_layernorm.weight", "F16", (self.hidden,)))
            specs.append((f"{stem}mlp.down_proj.weight", "F16", wide[::-1]))
            specs += [(f"{stem}mlp.{name}_proj.weight", "F16", wide) for name in ("gate", "up")]
            specs.append((f"{stem}post_attention_layernorm.weight", "F16", (self.hidden,)))
            specs += [(f"{stem}self_attn.{name}_proj.weight", "F16", square) for name in "koqv"]
        return [
            *specs,
            ("model.norm.weight", "F16", (self.hidden,)),
            ("lm_head.weight", "F16", (self.vocabulary, self.hidden)),
        ]


def shape_of(gigabytes: float, **sizes: int) -> Shape:
    """The shape with as many layers as come closest to a size."""

    def size(layers: int) -> int:
        return sum(tensor_bytes(dtype, shape) for _, dtype, shape in Shape(layers, **sizes).tensors())

    return Shape(max(round((gigabytes * 1e9 - size(0)) / (size(1) - size(0))), 1), **sizes)


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """A checkpoint of random bytes in shards, flushed to the device."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": shape.layers, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[TensorSpec]] = [[]]
    for spec in shape.tensors():
        if shards[-1] and sum(tensor_bytes(d, s) for _, d, s in [*shards[-1], spec]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {spec[0]: name for spec in specs}
        header = build_header(specs, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header.prelude)
            for start in range(0, header.data_bytes, PIECE):
                words = random.integers(0, 1 << 64, PIECE // 8, dtype=np.uint64) & FINITE
                file.write(words.view(np.uint8)[: header.data_bytes - start].data)
            file.flush()
            os.fsync(file.fileno())
    (folder / SHARD_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_random_placement(model: Path, path: Path) -> None:
    """A placement of random orders."""
    random = np.random.default_rng(1)
    with Checkpoint(model) as checkpoint:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint)))
        fingerprint = checkpoint.fingerprint
    arrays = {
        block.id: PlacedBlock(
            order=random.permutation(block.neurons).astype(np.int32),
            frequency=random.random(block.neurons, dtype=np.float32),
            links=np.zeros(1, dtype=np.int32),
        )
        for block in blocks
    }
    source = {"name": "random", "revision": None, "sha256": "0" * 64, "tokens": 1}
    header = PlacementHeader(
        model={"fingerprint": fingerprint, "model_type": "llama", "architecture": "llama"},
        origin=None,
        trace={"content_sha256": "0" * 64, "sources": [source]},
        signal="gate",
        calibration=None,
        parameters={"order": "linked"},
        blocks=tuple(map(_placed, blocks)),
    )
    write_placement(path, header, arrays, np.zeros((0, DIGEST_BYTES), dtype=np.uint8))


def _placed(block: FFNBlock) -> PlacementBlock:
    cost = {"original": OrderCost(1, 1.0), "linked": OrderCost(1, 1.0)}
    return PlacementBlock(
        id=block.id,
        neurons=block.neurons,
        activation=block.activation,
        threshold=0.0,
        tokens=1,
        order="linked",
        pinned=0,
        bundle_bytes=block.bundle_bytes,
        operation_in_bundles=1.0,
        collapse_gap=1,
        held_out=(HeldOutReads("random", 1, 1, 1, cost),),
    )


@dataclass
class Runs:
    """What the rounds of one command took."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    def measure(self, arguments: list[str]) -> None:
        """Run it once more, as a process of its own."""
        started = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{arguments} failed")
        self.seconds.append(time.perf_counter() - started)
        self.cpu.append(usage.ru_utime + usage.ru_stime)
        self.peak_mib = max(self.peak_mib, usage.ru_maxrss / 1024)


def drop_from_cache(*folders: Path) -> None:
    """Let the next reads come from the disk."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folders: list[str]) -> None:
    """The rival of `verify`: read all weights once and do nothing with them."""
    buffer = bytearray(1 << 20)
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure_rounds(work: Path, rounds: int, weights: str) -> dict[str, Runs]:
    """All commands in turn, and once more, and so on."""
    model, flash, copy = work / "model", work / "flash", work / "copy"
    command = [sys.executable, "-m", "neuralink_cli"]
    steps: dict[str, tuple[list[str], Path | None]] = {
        "cp and fsync": (["sh", "-c", f"mkdir {copy} && cp {model}/*.safetensors {copy} && sync {copy}/*"], copy),
        "neuralink relayout": (
            [
                *(*command, "relayout", str(model), "--placement", str(work / "placement")),
                *("-o", str(flash), "--weights", weights, "-q"),
            ],
            None,
        ),
        "reading both sides": ([sys.executable, __file__, "--read", str(model), str(flash)], None),
        "neuralink verify": ([*command, "verify", str(model), str(flash), "-q"], flash),
    }
    runs = {name: Runs() for name in steps}
    for _ in range(rounds):
        for name, (arguments, leftover) in steps.items():
            drop_from_cache(model, flash)
            runs[name].measure(arguments)
            if leftover is not None:
                shutil.rmtree(leftover)
    return runs


def print_runs(runs: dict[str, Runs], weight_bytes: int) -> None:
    """One table: medians, their spread, and ours over the rival's."""
    print(f"{'':20} {'s':>7} {'min':>7} {'max':>7} {'GB/s':>6} {'CPU s':>6} {'peak MiB':>9} {'x rival':>8}")
    rivals = {"neuralink relayout": "cp and fsync", "neuralink verify": "reading both sides"}
    for name, each in runs.items():
        seconds = statistics.median(each.seconds)
        row = f"{name:20} {seconds:7.2f} {min(each.seconds):7.2f} {max(each.seconds):7.2f}"
        row += f" {weight_bytes / seconds / 1e9:6.2f} {statistics.median(each.cpu):6.1f}"
        if name in rivals:
            row += f" {each.peak_mib:9.0f} {seconds / statistics.median(runs[rivals[name]].seconds):8.2f}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights; three times that is needed")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--weights", default="source", help="as relayout --weights; cp copies the source all the same")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_files(options.read)
        return
    sizes = {"hidden": options.hidden, "neurons": options.neurons, "vocabulary": options.vocabulary}
    shape = shape_of(options.gigabytes, **sizes)
    work = options.folder.absolute() / "neuralink-relayout-speed"
    shutil.rmtree(work, ignore_errors=True)
    try:
        write_checkpoint(work / "model", shape)
        write_random_placement(work / "model", work / "placement")
        weight_bytes = sum(path.stat().st_size for path in (work / "model").glob("*.safetensors"))
        block = 3 * shape.neurons * shape.hidden * 2
        print(f"{weight_bytes / 1e9:.1f} GB, {shape.layers} blocks of {block / 1e6:.0f} MB, {os.cpu_count()} CPUs")
        print_runs(measure_rounds(work, options.rounds, options.weights), weight_bytes)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
