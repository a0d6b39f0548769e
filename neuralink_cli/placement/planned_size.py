"""How large a placement will be, and the file where orders wait, before anything is ordered."""

from __future__ import annotations

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.files.json_text import canonical
from neuralink_cli.placement.held_out import TokenSplit, sequence_starts_in
from neuralink_cli.placement.placement import (
    COMPARED_ORDERS,
    DEFAULT_ORDER,
    HeldOutReads,
    OrderCost,
    PlacementBlock,
)

# Of a slot in the placement: the neuron, how often it fires, and where a link starts.
_PLACED_BYTES = 12
# Of a held-out sequence: its cost in each order that is measured, and read naively.
_COST_BYTES = 8 * (len(COMPARED_ORDERS) + 2)
# What is said once, of the model and of all blocks together, and the rest of a page.
_ONCE_BYTES = 8 << 10
_ARRAYS = ("order", "frequency", "links")
# A number of tokens or reads, and a cost, that are as long in text as most are at most.
_LONG, _COST = 10_000_000, 1234567.8901234567


def placement_bytes(trace: Trace) -> int:
    """Roughly the bytes of a placement for a trace: its arrays, and what it says of every block."""
    return _PLACED_BYTES * sum(block.neurons for block in trace.info.blocks) + header_bytes(trace)


def spool_bytes(trace: Trace, split: TokenSplit) -> int:
    """Roughly the bytes of the temporary file where ordered blocks wait: arrays, and what held-out sequences cost."""
    sequences = sum(sequence_starts_in(trace, held).size for held in split.held_out)
    return sum(_PLACED_BYTES * block.neurons + _COST_BYTES * sequences for block in trace.info.blocks)


def header_bytes(trace: Trace) -> int:
    """Roughly the bytes of a placement before its arrays: its document, and a line for every array."""
    # Blocks say the same in other numbers, so the one with the longest name stands for all.
    longest = max(trace.info.blocks, key=lambda block: len(block.id))
    document = canonical(_block_document(trace, longest))
    # In the header the document is a text, with a stroke before every quote.
    quoted = len(document) + document.count('"')
    line = {"dtype": "F32", "shape": [longest.neurons], "data_offsets": [_LONG, _LONG]}
    lines = sum(len(canonical({f"{longest.id}.{name}": line})) for name in _ARRAYS)
    return (quoted + lines) * len(trace.info.blocks) + _ONCE_BYTES


def _block_document(trace: Trace, block: TraceBlock) -> PlacementBlock:
    """What a placement says of a block, with numbers that are long."""
    orders = {name: OrderCost(_LONG, _COST) for name in (*COMPARED_ORDERS, DEFAULT_ORDER)}
    return PlacementBlock(
        id=block.id,
        neurons=block.neurons,
        activation=block.activation,
        threshold=block.threshold,
        tokens=_LONG,
        order=DEFAULT_ORDER,
        pinned=0,
        bundle_bytes=sum(block.part_bytes.values()),
        operation_in_bundles=_COST,
        collapse_gap=0,
        held_out=tuple(HeldOutReads(source.name, _LONG, _LONG, _LONG, orders) for source in trace.info.sources),
    )
