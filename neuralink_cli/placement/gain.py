"""The gain of each order on held-out tokens, summarised for tables, model cards and indexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuralink_cli.architectures.blocks import experts_of
from neuralink_cli.placement.placement import (
    MIXED,
    ORDER_NAMES,
    ORIGINAL,
    HeldOutReads,
    PlacementBlock,
    PlacementHeader,
)


@dataclass(frozen=True, slots=True)
class OrderFigures:
    """Figures of one order.

    Attributes:
        reads_per_token: Reads without access collapse.
        mean_read_length: Neurons per such read.
        bytes_per_token: Modelled cost with access collapse, as the bytes that the device reads in the same time.
        gain: Cost of the original order over that of this one, both with access collapse.
        gain_over_naive: Cost of the original order read without access collapse over that of this one with it.
    """

    reads_per_token: float
    mean_read_length: float
    bytes_per_token: float
    gain: float
    gain_over_naive: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Held-out figures of a block, or of several together: reads and costs of a token add up over blocks."""

    name: str
    chosen: str
    active_ratio: float
    orders: dict[str, OrderFigures]

    def as_document(self) -> dict[str, Any]:
        """The figures for JSON."""
        return asdict(self)


def block_gains(header: PlacementHeader) -> list[Gain]:
    """One `Gain` per block, all sources together."""
    return [_gain(block.id, [(block, block.held_out)]) for block in header.blocks]


def layer_gains(header: PlacementHeader) -> list[Gain]:
    """As `block_gains`, with the experts of a layer combined."""
    return [
        _gain(name if blocks[0].id == name else f"{name} ({len(blocks)})", [(b, b.held_out) for b in blocks])
        for name, blocks in _layers(header).items()
    ]


def _layers(header: PlacementHeader) -> dict[str, list[PlacementBlock]]:
    groups: dict[str, list[PlacementBlock]] = {}
    for block in header.blocks:
        groups.setdefault(experts_of(block.id) or block.id, []).append(block)
    return groups


def source_gains(header: PlacementHeader) -> list[Gain]:
    """One `Gain` per source, all blocks together."""
    names = [part.source for part in header.blocks[0].held_out]
    return [
        _gain(name, [(block, block.held_out[index : index + 1]) for block in header.blocks])
        for index, name in enumerate(names)
    ]


def total_gain(header: PlacementHeader) -> Gain:
    """All blocks and sources together."""
    return _gain("total", [(block, block.held_out) for block in header.blocks])


@dataclass(frozen=True, slots=True)
class StoredGain:
    """Held-out figures of what is stored in a block, or in several together, which may have different orders.

    Attributes:
        order: Name of the stored order; "mixed" if blocks differ.
        figures: None if nothing was held out.
    """

    name: str
    order: str
    active_ratio: float
    figures: OrderFigures | None


def stored_by_layer(header: PlacementHeader) -> list[StoredGain]:
    """What is stored in each block; the experts of a layer together."""
    found = []
    for gain, blocks in zip(layer_gains(header), _layers(header).values(), strict=True):
        found.append(_stored(gain, [(block, block.held_out) for block in blocks]))
    return found


def stored_by_source(header: PlacementHeader) -> list[StoredGain]:
    """What is stored, on each source, all blocks together."""
    return [
        _stored(gain, [(block, block.held_out[index : index + 1]) for block in header.blocks])
        for index, gain in enumerate(source_gains(header))
    ]


def stored_in_total(header: PlacementHeader) -> StoredGain:
    """What is stored, all blocks and sources together."""
    return _stored(total_gain(header), [(block, block.held_out) for block in header.blocks])


def _stored(gain: Gain, blocks: Sequence[tuple[PlacementBlock, Sequence[HeldOutReads]]]) -> StoredGain:
    held_out = [part for _, parts in blocks for part in parts if part.tokens]
    known = held_out and all(block.order in part.orders for block, parts in blocks for part in parts if part.tokens)
    active = sum(part.active for part in held_out)
    figures = _figures(None, blocks, active) if known else None
    return StoredGain(gain.name, gain.chosen, gain.active_ratio, figures)


def _gain(name: str, blocks: Sequence[tuple[PlacementBlock, Sequence[HeldOutReads]]]) -> Gain:
    parts = [part for _, held_out in blocks for part in held_out if part.tokens]
    possible = sum(part.routed * (block.neurons - block.pinned) for block, held_out in blocks for part in held_out)
    active = sum(part.active for part in parts)
    chosen = {block.order for block, _ in blocks}
    names = [order for order in parts[0].orders if all(order in part.orders for part in parts)] if parts else []
    return Gain(
        name=name,
        chosen=chosen.pop() if len(chosen) == 1 else MIXED,
        active_ratio=active / possible if possible else 0.0,
        orders={order: _figures(order, blocks, active) for order in sorted(names, key=_table_position)},
    )


def _figures(
    order: str | None, blocks: Sequence[tuple[PlacementBlock, Sequence[HeldOutReads]]], active: int
) -> OrderFigures:
    """Of one order; None for the one that each block stores."""
    reads_per_token, bytes_per_token, original_bytes, naive_bytes, reads = 0.0, 0.0, 0.0, 0.0, 0
    for block, held_out in blocks:
        tokens = sum(part.tokens for part in held_out)
        if not tokens:
            continue
        name = order or block.order
        block_reads = sum(part.orders[name].reads for part in held_out if part.tokens)
        cost = sum(part.orders[name].cost for part in held_out if part.tokens)
        original = sum(part.orders[ORIGINAL].cost for part in held_out if part.tokens)
        reads += block_reads
        reads_per_token += block_reads / tokens
        bytes_per_token += cost * block.bundle_bytes / tokens
        original_bytes += original * block.bundle_bytes / tokens
        apart = sum(
            part.active + block.operation_in_bundles * part.orders[ORIGINAL].reads for part in held_out if part.tokens
        )
        naive_bytes += apart * block.bundle_bytes / tokens
    return OrderFigures(
        reads_per_token=reads_per_token,
        mean_read_length=active / reads if reads else 0.0,
        bytes_per_token=bytes_per_token,
        gain=original_bytes / bytes_per_token if bytes_per_token else 1.0,
        gain_over_naive=naive_bytes / bytes_per_token if bytes_per_token else 1.0,
    )


def _table_position(order: str) -> tuple[int, str]:
    return (ORDER_NAMES.index(order) if order in ORDER_NAMES else len(ORDER_NAMES)), order
