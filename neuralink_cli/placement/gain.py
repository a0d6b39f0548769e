"""What an order gains on held-out tokens, summed up for tables, cards and indexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuralink_cli.placement.placement import ORDER_NAMES, HeldOutReads, PlacementBlock, PlacementHeader, total_reads


@dataclass(frozen=True)
class OrderFigures:
    """Figures of one order: reads per token of one block, and neurons per read."""

    reads_per_token: float
    mean_read_length: float


@dataclass(frozen=True)
class BlockGain:
    """Held-out figures of a block (or of all, or of one source): `active_ratio` of its neurons, and each order's."""

    name: str
    chosen: str
    active_ratio: float
    orders: dict[str, OrderFigures]

    def as_document(self) -> dict[str, Any]:
        """For JSON output."""
        orders = {name: vars(figures) for name, figures in self.orders.items()}
        return {"name": self.name, "order": self.chosen, "active_ratio": self.active_ratio, "orders": orders}


def block_gains(header: PlacementHeader) -> list[BlockGain]:
    """One `BlockGain` per block."""
    return [_gain(block.id, block.order, block.neurons, block.held_out) for block in header.blocks]


def total_gain(header: PlacementHeader) -> BlockGain:
    """All blocks and sources together."""
    return _combined(header.blocks, "total", [part for block in header.blocks for part in block.held_out])


def source_gains(header: PlacementHeader) -> list[BlockGain]:
    """All blocks together, one `BlockGain` per source."""
    sources = range(len(header.blocks[0].held_out)) if header.blocks else range(0)
    return [
        _combined(
            header.blocks,
            header.blocks[0].held_out[source].source,
            [block.held_out[source] for block in header.blocks if source < len(block.held_out)],
        )
        for source in sources
    ]


def _table_position(item: tuple[str, int]) -> tuple[int, str]:
    name = item[0]
    return (ORDER_NAMES.index(name) if name in ORDER_NAMES else len(ORDER_NAMES)), name


def _combined(blocks: Sequence[PlacementBlock], name: str, parts: Sequence[HeldOutReads]) -> BlockGain:
    chosen = {block.order for block in blocks}
    neurons = sum(block.neurons for block in blocks) / max(len(blocks), 1)
    return _gain(name, chosen.pop() if len(chosen) == 1 else "mixed", neurons, parts)


def _gain(name: str, chosen: str, neurons: float, parts: Sequence[HeldOutReads]) -> BlockGain:
    total = total_reads(parts)
    orders = {
        order: OrderFigures(
            reads_per_token=reads / total.tokens if total.tokens else 0.0,
            mean_read_length=total.active / reads if reads else 0.0,
        )
        for order, reads in sorted(total.reads.items(), key=_table_position)
    }
    possible = total.tokens * neurons
    return BlockGain(name, chosen, total.active / possible if possible else 0.0, orders)
