"""What stored orders cost on the tokens of a trace: the same figures that `cluster` measures on held-out tokens.

Pinned neurons are in DRAM and cost nothing; there is no other cache. The original order, too, has them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import Contender, TokenRange
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.ordering.block_ordering import block_bits, cost_sequences
from neuralink_cli.placement.bits import activation_counts
from neuralink_cli.placement.placement import ORIGINAL, STORED
from neuralink_cli.progress import Progress, no_progress

Costs = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OrderCosts:
    """What the sequences of some tokens cost in each block, as the bytes that the device reads in the same time.

    Attributes:
        stored: The stored order, read with access collapse: float64 `[blocks, sequences]`.
        original: The original order, read with access collapse.
        naive: The original order, read without.
        fired: For each block how often each neuron fired, int64 `[neurons]`, pinned ones included.
    """

    stored: Costs
    original: Costs
    naive: Costs
    fired: tuple[npt.NDArray[np.int64], ...]


def measure_orders(
    trace: Trace,
    contenders: Sequence[Contender],
    tokens: Sequence[TokenRange],
    device: DeviceModel,
    *,
    progress: Progress = no_progress,
) -> list[OrderCosts]:
    """Cost the orders of layouts or placements of one model on some tokens of a trace, block by block.

    Args:
        contenders: Of the model of the trace, see `read_contender`.
        tokens: Ascending, in the order of the trace.
        device: What reads are made from.

    Returns:
        What each contender costs, all on the same sequences.
    """
    ranges = [(part.start, part.stop) for part in tokens]
    found: list[list[tuple[Costs, Costs, Costs]]] = [[] for _ in contenders]
    fired = []
    with progress("measure", len(trace.info.blocks), "block") as advance:
        for index, block in enumerate(trace.info.blocks):
            all_bits = block_bits(trace, block, ranges)
            fired.append(activation_counts(all_bits).astype(np.int64))
            for contender, costs in zip(contenders, found, strict=True):
                stored = contender.blocks[index]
                pinned = stored.order[: stored.pinned]
                bits = all_bits
                if pinned.size:
                    bits = all_bits.copy()
                    bits[pinned] = 0
                rest = np.setdiff1d(np.arange(block.neurons, dtype=np.int32), pinned)
                orders = {STORED: stored.order, ORIGINAL: np.concatenate([pinned, rest]).astype(np.int32)}
                ratio = device.operation_in_bundles(stored.stride)
                bundles = cost_sequences(trace, block, ranges, bits, orders, ratio)
                stride = stored.stride
                costs.append(
                    (stride * bundles.collapsed[STORED], stride * bundles.collapsed[ORIGINAL], stride * bundles.naive)
                )
            advance(1)
    return [
        OrderCosts(
            stored=np.stack([stored for stored, _, _ in costs]),
            original=np.stack([original for _, original, _ in costs]),
            naive=np.stack([naive for _, _, naive in costs]),
            fired=tuple(fired),
        )
        for costs in found
    ]
