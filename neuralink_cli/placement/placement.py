"""The placement file: for every FFN block the order in which its neurons are stored, and its expected gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.calibration.digests import DIGEST_BYTES
from neuralink_cli.checkpoint.origin import Origin, parse_origin
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import fields_of
from neuralink_cli.files.schema import Schema
from neuralink_cli.files.stage_file import StageFile, StreamedTensor, array_tensor, write_stage_file

Frequency = npt.NDArray[np.float32]
# Digests of the sequences that made the order: they must never measure it.
ORDERING_SEQUENCES = "ordering_sequences"
PLACEMENT_SCHEMA = Schema("placement", __package__, "placement.schema.json")

# The names of orders in files and options.
ORIGINAL = "original"
FREQUENCY = "frequency"
REVERSE_CUTHILL_MCKEE = "reverse-cuthill-mckee"
SPECTRAL = "spectral"
LINKED = "linked"
REFINED = "refined"

# The sequence in which tables show the orders.
ORDER_NAMES = (ORIGINAL, FREQUENCY, REVERSE_CUTHILL_MCKEE, SPECTRAL, LINKED, REFINED)
DEFAULT_ORDER = REFINED
# Not an order but whichever one each block stores.
STORED = "stored"
# Stands for the name of what blocks store, if they differ.
MIXED = "mixed"
# Measured whatever order is asked for.
COMPARED_ORDERS = (ORIGINAL, FREQUENCY, LINKED)

# How long the refinement searches, shortest first.
EFFORT_NAMES = ("fast", "normal", "max")


@dataclass(frozen=True, slots=True)
class OrderCost:
    """What an order reads: runs of active slots, and its cost in bundles with access collapse on the device."""

    reads: int
    cost: float


@dataclass(frozen=True, slots=True)
class HeldOutReads:
    """What each order reads on the held-out tokens of one source.

    Attributes:
        tokens: Tokens held out from the source.
        routed: Held-out tokens that the block ran on: all, except for an expert.
        active: How often neurons that are not pinned fired.
    """

    source: str
    tokens: int
    routed: int
    active: int
    orders: Mapping[str, OrderCost]


@dataclass(frozen=True, slots=True)
class PlacementBlock:
    """What the placement says about one block.

    Attributes:
        tokens: Tokens that made the order: tokens of the ordering that the block ran on.
        order: Name of the order that was chosen.
        pinned: How many slots, from 0 on, hold the hottest neurons, which live in DRAM.
        bundle_bytes: Bytes of a bundle that the order was made for.
        operation_in_bundles: What a read operation costs on the device, in bundles.
        collapse_gap: Longest gap of inactive slots worth reading across.
    """

    id: str
    neurons: int
    activation: str
    threshold: float
    tokens: int
    order: str
    pinned: int
    bundle_bytes: int
    operation_in_bundles: float
    collapse_gap: int
    held_out: tuple[HeldOutReads, ...]


@dataclass(frozen=True)
class MeasuredGain:
    """What an order gains on held-out tokens, all blocks together.

    Attributes:
        source: The dataset; None for all of them.
        order: Name of the order; "stored" for what is stored, which may differ from block to block.
        gain: Cost of the original order over that of this one, both read with access collapse.
        gain_over_naive: Cost of the original order read without access collapse over that of this one with it.
    """

    source: str | None
    order: str
    gain: Ratio
    gain_over_naive: Ratio


@dataclass(frozen=True)
class PlacementHeader:
    """Everything a placement says beside its arrays.

    Attributes:
        gains: What the orders gain; empty if nothing was held out.
        coverage: As in the trace.
    """

    model: Mapping[str, str]
    origin: Origin | None
    trace: Mapping[str, Any]
    signal: str
    calibration: Mapping[str, Any] | None
    parameters: Mapping[str, Any]
    blocks: tuple[PlacementBlock, ...]
    gains: tuple[MeasuredGain, ...] = ()
    coverage: Mapping[str, int] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class PlacedBlock:
    """The arrays of one block, all by slot.

    Attributes:
        order: int32 `[n]`, `order[slot] = neuron`, a permutation.
        frequency: float32 `[n]`, the share of calibration tokens for which the neuron in that slot fires.
        links: int32 `[k]`, ascending slots at which the links start.
    """

    order: Order
    frequency: Frequency
    links: npt.NDArray[np.int32]


def write_placement(
    path: Path,
    header: PlacementHeader,
    arrays: Mapping[str, PlacedBlock],
    ordering_sequences: Bytes,
    *,
    overwrite: bool = False,
) -> str:
    """Write a placement and return its `content_sha256`.

    Args:
        arrays: By block id; a block is asked for when it is written, so they need not all be in memory.
        ordering_sequences: uint8 `[k, 16]`, digests of the sequences that made the order, ascending.

    Raises:
        OutputError: As `write_stage_file`.
    """
    tensors = []
    for block in header.blocks:
        placed = arrays[block.id]
        for name, dtype in (("order", "I32"), ("frequency", "F32"), ("links", "I32")):
            chunks = partial(_one_array, arrays, block.id, name)
            tensors.append(StreamedTensor(f"{block.id}.{name}", dtype, getattr(placed, name).shape, chunks))
    tensors.append(array_tensor(ORDERING_SEQUENCES, ordering_sequences))
    return write_stage_file(path, PLACEMENT_SCHEMA, fields_of(header), tensors, overwrite=overwrite)


def _one_array(arrays: Mapping[str, PlacedBlock], block_id: str, name: str) -> list[npt.NDArray[Any]]:
    return [np.ascontiguousarray(getattr(arrays[block_id], name))]


class Placement(StageFile):
    """An open placement; its content digest is checked, and that every order is a permutation.

    Raises:
        InputError: Not a placement, damaged, or an order that is not a permutation.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, PLACEMENT_SCHEMA)
        try:
            self.check_content()
            self.info = parse_placement(self.document)
            if len({block.id for block in self.info.blocks}) != len(self.info.blocks):
                raise InputError("lists a block twice", where=self.path)
            self.blocks = {block.id: self._read(block) for block in self.info.blocks}
            self.ordering_sequences: Bytes = self.array(ORDERING_SEQUENCES, "U8")
            if self.ordering_sequences.ndim != 2 or self.ordering_sequences.shape[1] != DIGEST_BYTES:
                raise InputError(f"{ORDERING_SEQUENCES} has the wrong shape", where=path)
        except InputError:
            self.close()
            raise

    def _read(self, block: PlacementBlock) -> PlacedBlock:
        order = self.array(f"{block.id}.order", "I32")
        if not is_permutation(order, block.neurons):
            raise InputError(f"{block.id}.order is not a permutation of {block.neurons} neurons", where=self.path)
        if block.pinned > block.neurons:
            raise InputError(f"{block.id} pins {block.pinned} neurons but has only {block.neurons}", where=self.path)
        frequency = self.array(f"{block.id}.frequency", "F32")
        if frequency.shape != (block.neurons,):
            raise InputError(f"{block.id}.frequency has shape {list(frequency.shape)}", where=self.path)
        return PlacedBlock(order, frequency, self.array(f"{block.id}.links", "I32"))


def is_permutation(order: npt.NDArray[Any], neurons: int) -> bool:
    """Whether `order` holds each of 0 .. neurons - 1 exactly once."""
    if order.shape != (neurons,) or (neurons and (order.min() < 0 or order.max() >= neurons)):
        return False
    return bool((np.bincount(order, minlength=neurons) == 1).all())


def inverse(order: Order) -> Order:
    """The inverse permutation: `inverse(order)[neuron] = slot`."""
    slots = np.empty_like(order)
    slots[order] = np.arange(order.size, dtype=order.dtype)
    return slots


def parse_placement(document: Mapping[str, Any]) -> PlacementHeader:
    """Everything that the checked document of a placement says."""
    blocks = tuple(
        PlacementBlock(**{**block, "held_out": tuple(_parse_held_out(part) for part in block["held_out"])})
        for block in document["blocks"]
    )
    keys = ("model", "trace", "signal", "calibration", "parameters")
    origin = parse_origin(document["origin"])
    gains = tuple(_parse_gain(gain) for gain in document["gains"])
    return PlacementHeader(
        **{key: document[key] for key in keys},
        origin=origin,
        blocks=blocks,
        gains=gains,
        coverage=document.get("coverage"),
    )


def _parse_gain(gain: Mapping[str, Any]) -> MeasuredGain:
    ratios = {key: Ratio(**gain[key]) for key in ("gain", "gain_over_naive")}
    return MeasuredGain(**{**gain, **ratios})


def _parse_held_out(part: Mapping[str, Any]) -> HeldOutReads:
    orders = {name: OrderCost(**cost) for name, cost in part["orders"].items()}
    return HeldOutReads(**{**part, "orders": orders})
