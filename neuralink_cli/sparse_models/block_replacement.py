"""Puts sparse modules in the place of a model's FFN modules, before any weight is loaded, and then their weights in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import ExpertPlace
from neuralink_cli.files.header import DTYPE_BITS
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.plan import FlashBlock, ResidentTensor
from neuralink_cli.models.find_modules import find_experts
from neuralink_cli.sparse_models.block_places import BlockPlaces, block_places, deciding_rule
from neuralink_cli.sparse_models.flash_weights import FlashWeights
from neuralink_cli.sparse_models.memory import neuron_bytes
from neuralink_cli.sparse_models.neuron_store import NeuronStore
from neuralink_cli.sparse_models.settings import RunSettings
from neuralink_cli.sparse_models.sparse_block import FiringNeurons, FusedGateUp, ResidentRows, SparseDown, SparseUp
from neuralink_cli.sparse_models.sparse_experts import Expert, SparseExperts
from neuralink_cli.sparse_models.stored_weights import StoredWeights
from neuralink_cli.sparse_models.tensors import as_tensor


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a block: the rows that decide firing and biases, by slot, and the neurons.

    `bias` is that of the rows, `output_bias` `[hidden]` that of the down projection.
    """

    neurons: FiringNeurons
    rows: torch.Tensor
    bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    output_bias: torch.Tensor | None


# Gives the modules of a block their weights.
Attach = Callable[[BlockWeights], None]


def replace_blocks(model: Any, blocks: Sequence[FlashBlock], architecture: Architecture) -> list[Attach]:
    """Replace the modules of blocks; for each block, what gives the new ones their weights.

    Raises:
        UnsupportedError: The model has no module for a block, or one that is not known.
    """
    places = [block_places(block, architecture) for block in blocks]
    # By module, the most that an expert of it is numbered.
    last: dict[str, int] = {}
    for block, place in zip(blocks, places, strict=True):
        if place.experts is not None and block.expert is not None:
            last[place.experts] = max(last.get(place.experts, 0), block.expert)
    experts = {name: SparseExperts(find_experts(model, ExpertPlace(name, n), architecture)) for name, n in last.items()}

    def replace(block: FlashBlock, place: BlockPlaces) -> Attach:
        if place.experts is None or block.expert is None:
            return _replace_modules(model, place, architecture)
        return _attach_expert(experts[place.experts], block.expert)

    return [replace(block, place) for block, place in zip(blocks, places, strict=True)]


def _attach_expert(experts: SparseExperts, number: int) -> Attach:
    def attach(weights: BlockWeights) -> None:
        rows = ResidentRows(gate=False)
        rows.attach(weights.rows, weights.bias)
        experts.attach(number, Expert(rows, weights.up_bias, weights.output_bias, weights.neurons))

    return attach


def _replace_modules(model: Any, places: BlockPlaces, architecture: Architecture) -> Attach:
    up: SparseUp | None = None
    modules: dict[str, nn.Module] = {}
    if places.fused:
        fused = FusedGateUp(gate_first=places.gate_first)
        firing, up = fused.gate, fused.up
        modules["gate"] = fused
    else:
        firing = ResidentRows(gate=places.gated)
        modules[places.firing] = firing
        if places.gated:
            modules["up"] = up = SparseUp(firing)
    modules["down"] = down = SparseDown(up)
    names = {id(module): name for name, module in model.named_modules()}
    # All are looked up before the first is replaced.
    found = {role: names[id(places.find(model, role, architecture))] for role in modules}
    for role, name in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, modules[role])

    def attach(weights: BlockWeights) -> None:
        firing.attach(weights.rows, weights.bias)
        if up is not None:
            up.attach(weights.neurons, weights.up_bias)
        down.attach(weights.neurons, weights.output_bias)

    return attach


def block_weights(
    layout: BundledLayout, weights: FlashWeights, store: NeuronStore, settings: RunSettings
) -> BlockWeights:
    """Load what of a block stays in DRAM, and count its bytes.

    Args:
        settings: With a dtype that is not "auto".

    Raises:
        UnsupportedError: The block's activation or dtype is not supported.
    """
    block = store.block
    dtype: torch.dtype = getattr(torch, settings.dtype)
    kept = {(each.role, each.kind): _loaded(layout, block, each, dtype) for each in block.resident}
    weights.resident_bytes += sum(tensor.nbytes for tensor in kept.values())
    role = next(role for role, kind in kept if kind == "rows")
    gated = len(block.parts) > 1
    each = neuron_bytes(block, dtype.itemsize)
    at_once = max(settings.working_bytes // each, 1)
    weights.working_bytes = max(weights.working_bytes, min(at_once, block.neurons) * each)
    return BlockWeights(
        FiringNeurons(store, deciding_rule(block), at_once, layout.file.path),
        rows=kept[role, "rows"],
        bias=kept.get((role, "bias")),
        up_bias=kept.get(("up", "bias")) if gated else None,
        output_bias=kept.get(("down", "output_bias")),
    )


def _loaded(layout: BundledLayout, block: FlashBlock, kept: ResidentTensor, dtype: torch.dtype) -> torch.Tensor:
    if kept.kind != "output_bias":
        return _stored(layout, block, kept).to(dtype=dtype)
    # The tensor may hold those of all experts of a layer.
    start, size = kept.source_start, block.hidden * DTYPE_BITS[kept.place.dtype] // 8
    data = layout.file.read(kept.place.tensor, start, start + size)
    return as_tensor(data, kept.place.dtype, (block.hidden,), layout.file.path).to(dtype)


def _stored(layout: BundledLayout, block: FlashBlock, kept: ResidentTensor) -> StoredWeights:
    rows = kept.kind == "rows"
    dtype, shape = (block.dtype, (block.neurons, block.hidden)) if rows else (kept.place.dtype, kept.place.shape)
    return StoredWeights(layout.file, kept.place.tensor, dtype, shape, kept.weights)
