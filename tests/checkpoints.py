"""Small checkpoints made of raw bytes, by an encoder that shares nothing with the package, and what belongs to them.

>>> write_checkpoint(tmp_path / "opt", "opt", dtype="BF16", shards=2)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from neuralink_cli.activations.trace import TraceHeader, TraceSource, trace_block, write_trace
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.placement.placement import (
    HeldOutReads,
    OrderCost,
    PlacedBlock,
    PlacementBlock,
    PlacementHeader,
    write_placement,
)
from tests.traces import numbered_digests

# Bytes of an element; written down here again so that a mistake in the package's table shows.
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I64": 8, "C64": 8}
FAMILIES = ("opt", "llama", "gpt2", "bert")
# None a multiple of the other, nor of 8.
NEURONS = 37
HIDDEN = 20
LAYERS = 2
# Large enough for the fingerprint to sample it.
VOCABULARY = 1100

CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"num_hidden_layers": LAYERS, "activation_function": "relu", "hidden_size": HIDDEN},
    "llama": {"num_hidden_layers": LAYERS, "hidden_act": "silu", "hidden_size": HIDDEN},
    "gpt2": {"n_layer": LAYERS, "activation_function": "gelu_new", "n_embd": HIDDEN},
    "bert": {"num_hidden_layers": LAYERS, "hidden_act": "gelu", "hidden_size": HIDDEN},
    "gpt_oss": {"num_hidden_layers": LAYERS, "hidden_act": "silu", "hidden_size": HIDDEN, "num_local_experts": 2},
}
README = b"---\nlicense: mit\n---\n# A model\n\nWith a card.\n"


# The reference reader of safetensors files, whose stubs give it no types.
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


@dataclass(frozen=True)
class RawTensor:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        stop = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values())


def decode(path: Path) -> dict[str, RawTensor]:
    """All tensors of a safetensors file, by a few lines that trust it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    return {
        name: RawTensor(spec["dtype"], tuple(spec["shape"]), data[slice(*spec["data_offsets"])])
        for name, spec in header.items()
        if name != "__metadata__"
    }


def random_tensor(random: np.random.Generator, dtype: str, *shape: int) -> RawTensor:
    """Random bytes, whatever they mean."""
    return RawTensor(dtype, shape, random.bytes(prod(shape) * ELEMENT_BYTES[dtype]))


def tensors_of(
    family: str,
    *,
    dtype: str = "F32",
    seed: int = 0,
    neurons: int = NEURONS,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    bias: bool | None = None,
) -> dict[str, RawTensor]:
    """The tensors of a model: its FFN blocks, and a few others of several dtypes.

    Args:
        bias: Whether the FFNs have biases; by default as the family has them.
    """
    random = np.random.default_rng(seed)
    bias = family != "llama" if bias is None else bias
    tensors: dict[str, RawTensor] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = random_tensor(random, dtype, *shape)

    add("model.embed_tokens.weight", VOCABULARY, hidden)
    for layer in range(layers):
        if family == "gpt_oss":
            # Gate and up columns alternate, for 2 experts.
            stem = f"model.layers.{layer}.mlp.experts."
            add(f"{stem}down_proj", 2, neurons, hidden)
            add(f"{stem}down_proj_bias", 2, hidden)
            add(f"{stem}gate_up_proj", 2, hidden, 2 * neurons)
            add(f"{stem}gate_up_proj_bias", 2, 2 * neurons)
            continue
        match family:
            case "opt":
                stem, up, down = f"model.decoder.layers.{layer}.", "fc1", "fc2"
            case "llama":
                stem, up, down = f"model.layers.{layer}.mlp.", "up_proj", "down_proj"
                add(f"{stem}gate_proj.weight", neurons, hidden)
                if bias:
                    add(f"{stem}gate_proj.bias", neurons)
            case "gpt2":
                stem, up, down = f"transformer.h.{layer}.mlp.", "c_fc", "c_proj"
            case "bert":
                stem, up, down = f"bert.encoder.layer.{layer}.", "intermediate.dense", "output.dense"
            case _:
                raise ValueError(family)
        transposed = family == "gpt2"
        add(f"{stem}{down}.weight", *((neurons, hidden) if transposed else (hidden, neurons)))
        add(f"{stem}{up}.weight", *((hidden, neurons) if transposed else (neurons, hidden)))
        if bias:
            add(f"{stem}{up}.bias", neurons)
            add(f"{stem}{down}.bias", hidden)
        add(f"model.norm.{layer}.weight", hidden)
    tensors["position_ids"] = random_tensor(random, "I64", 1, 7)
    tensors["mask"] = random_tensor(random, "U8", 3, 5)
    tensors["empty"] = random_tensor(random, "F32", 0, 4)
    tensors["scalar"] = random_tensor(random, "F32")
    return tensors


def write_checkpoint(
    directory: Path,
    family: str = "opt",
    *,
    shards: int = 1,
    readme: bytes | None = README,
    tensors: Mapping[str, RawTensor] | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a checkpoint directory and return it.

    Args:
        shards: More than 1 splits the tensors and writes the index.
        tensors: Instead of `tensors_of(family, **options)`.
        config: Overrides keys of the family's config; None as a value removes one.
    """
    directory.mkdir(parents=True)
    whole = {"model_type": family, **CONFIGS[family], **(config or {})}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    (directory / "tokenizer.json").write_bytes(b'{"version": "1.0"}\r\n')
    if readme is not None:
        (directory / "README.md").write_bytes(readme)
    write_weights(directory, tensors_of(family, **options) if tensors is None else tensors, shards=shards)
    return directory


def write_weights(directory: Path, tensors: Mapping[str, RawTensor], *, shards: int = 1) -> None:
    """Write the weight files, and the index if there are several."""
    if shards == 1:
        (directory / "model.safetensors").write_bytes(encode(tensors, {"format": "pt"}))
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        (directory / file).write_bytes(encode(part, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def blocks_of(checkpoint: Checkpoint) -> tuple[FFNBlock, ...]:
    """The FFN blocks of a checkpoint of a built-in architecture."""
    return find_blocks(checkpoint, choose_architecture(describe(checkpoint)))


def placement_block(block: FFNBlock, threshold: float = 0.25) -> PlacementBlock:
    """What a placement may say of a block."""
    orders = {"original": OrderCost(90, 130.5), "frequency": OrderCost(80, 120.25), "linked": OrderCost(60, 100.0)}
    return PlacementBlock(
        id=block.id,
        neurons=block.neurons,
        activation=block.activation,
        threshold=threshold,
        tokens=400,
        order="linked",
        pinned=3,
        bundle_bytes=block.bundle_bytes,
        operation_in_bundles=4.5,
        collapse_gap=4,
        held_out=(HeldOutReads("text", 100, 100, 95, orders),),
    )


def write_random_placement(
    model: Path, path: Path, *, seed: int = 0, threshold: float = 0.25, blocks: Sequence[FFNBlock] | None = None
) -> Path:
    """Write a placement of random orders for a checkpoint and return its path."""
    random = np.random.default_rng(seed)
    with Checkpoint(model) as checkpoint:
        blocks = blocks_of(checkpoint) if blocks is None else blocks
        identity = {
            "fingerprint": checkpoint.fingerprint,
            "model_type": checkpoint.model_type,
            "architecture": checkpoint.model_type,
        }
    arrays = {
        block.id: PlacedBlock(
            order=random.permutation(block.neurons).astype(np.int32),
            frequency=random.random(block.neurons, dtype=np.float32),
            links=np.arange(0, block.neurons, 3, dtype=np.int32),
        )
        for block in blocks
    }
    source = {"name": "text", "revision": None, "sha256": "cd" * 32, "tokens": 500}
    header = PlacementHeader(
        model=identity,
        origin=None,
        trace={"content_sha256": "ab" * 32, "sources": [source]},
        signal="gate",
        calibration={"active_ratio": 0.3, "tokens": 400},
        parameters={"order": "linked", "held_out": 0.2},
        blocks=tuple(placement_block(block, threshold) for block in blocks),
    )
    write_placement(path, header, arrays, numbered_digests(2))
    return path


def write_random_trace(
    model: Path,
    path: Path,
    *,
    tokens: int = 600,
    seed: int = 0,
    threshold: float = 0.25,
    coverage: Mapping[str, int] | None = None,
) -> Path:
    """Write a trace for a checkpoint, in which neurons fire in groups, and return its path."""
    random = np.random.default_rng(seed)
    with Checkpoint(model) as checkpoint:
        blocks = [trace_block(block, threshold) for block in blocks_of(checkpoint)]
        identity = {
            "fingerprint": checkpoint.fingerprint,
            "model_type": checkpoint.model_type,
            "architecture": checkpoint.model_type,
        }
    lengths = np.array([tokens // 3, tokens - tokens // 3 - tokens // 5, tokens // 5], dtype=np.uint32)
    source = TraceSource("text.txt", f"{seed:02x}" * 32, 0, 3, 3, tokens, {"batch_size": 8})
    calibration = {"active_ratio": 0.3, "tokens": 400}
    header = TraceHeader(identity, None, "gate", calibration, tuple(blocks), (source,), coverage)
    bits = {}
    for block in blocks:
        group = random.integers(0, 5, block.neurons)
        fired = (random.random((tokens, 5)) < 0.2)[:, group] & (random.random((tokens, block.neurons)) < 0.8)
        bits[block.id] = np.packbits(fired, axis=1, bitorder="little")
    digests = numbered_digests(3, first=1000 * seed + tokens - 600)
    write_trace(path, header, lengths, digests, lambda block_id: [bits[block_id]])
    return path


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, by relative name."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
