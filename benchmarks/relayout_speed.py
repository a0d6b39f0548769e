"""`neuralink relayout` against `cp` and fsync, `neuralink verify` against reading both sides once, with peak memory.

python benchmarks/relayout_speed.py --folder /on/the/disk                    # 2 GB of weights; needs 3 times that
python benchmarks/relayout_speed.py --folder /on/the/disk --gigabytes 13.5   # Llama 2 7B

The weights are random bytes in the shape of Llama 2 7B with fewer or more layers, the order is random too: it decides
nothing here. Before every run the files that it reads are dropped from the page cache. The runs take turns; each is a
process of its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuralink_cli.checkpoint.architecture import choose_architecture
from neuralink_cli.checkpoint.block_search import find_blocks
from neuralink_cli.checkpoint.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import SHARD_INDEX, Checkpoint
from neuralink_cli.checkpoint.header import build_header, tensor_bytes
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
    weight_map = {}
    for number, specs in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {spec[0]: name for spec in specs}
        header = build_header(specs, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header.prelude)
            for start in range(0, header.data_bytes, PIECE):
                words = random.integers(0, 1 << 64, PIECE // 8, dtype=np.uint64)
                file.write(words.view(np.uint8)[: header.data_bytes - start].data)
            file.flush()
            os.fsync(file.fileno())
    (folder / SHARD_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_random_placement(model: Path, path: Path) -> None:
    """A placement of random orders."""
    random = np.random.default_rng(1)
    with Checkpoint(model) as checkpoint:
        blocks = find_blocks(checkpoint, choose_architecture(checkpoint.model_type, model, None))
        fingerprint = checkpoint.fingerprint
    arrays = {
        block.id: PlacedBlock(
            order=random.permutation(block.neurons).astype(np.int32),
            frequency=random.random(block.neurons, dtype=np.float32),
            links=np.zeros(1, dtype=np.int32),
        )
        for block in blocks
    }
    header = PlacementHeader(
        model={"fingerprint": fingerprint, "model_type": "llama", "architecture": "llama"},
        trace={"content_sha256": "0" * 64, "sources": [{"name": "random", "sha256": "0" * 64, "tokens": 1}]},
        signal="gate",
        calibration=None,
        parameters={"order": "linked"},
        blocks=tuple(map(_placed, blocks)),
    )
    write_placement(path, header, arrays)


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
