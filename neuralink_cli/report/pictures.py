"""Pictures of a block: which slots fire at which token, and which fire together, in some order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.arrays import Order
from neuralink_cli.bench.contenders import ContenderBlock, TokenRange
from neuralink_cli.bench.ways import fired_at

Picture = npt.NDArray[np.float32]
# No picture has more cells than this, in tokens, in slots, and in slots of a co-activation.
RASTER_TOKENS, RASTER_SLOTS, PAIR_CELLS = 240, 768, 96
# A co-activation is counted over so many tokens.
PAIR_TOKENS = 2048
_STRETCH = 64


@dataclass(frozen=True, eq=False)
class BlockPictures:
    """A block in original and stored order. A cell stands for neighbouring slots.

    Attributes:
        slots_per_cell: Slots of a cell of the rasters.
        raster_tokens: Tokens of the rasters: the first ones of `tokens`.
        original: float32 `[raster_tokens, cells]`, the share of the cell's slots that fire, in original order.
        stored: The same in stored order.
        pair_tokens: Tokens of the co-activations.
        original_pairs: float32 `[cells, cells]`, the `co_activation` in original order.
        stored_pairs: The same in stored order.
    """

    block: str
    neurons: int
    slots_per_cell: int
    raster_tokens: int
    original: Picture
    stored: Picture
    pair_tokens: int
    original_pairs: Picture
    stored_pairs: Picture


def block_pictures(trace: Trace, index: int, stored: ContenderBlock, tokens: Sequence[TokenRange]) -> BlockPictures:
    """The pictures of one block, from tokens in their order; of an expert, those that were routed to it first."""
    fired = np.unpackbits(_rows(trace, index, tokens), axis=1, count=stored.neurons, bitorder="little")
    per_cell = -(-stored.neurons // RASTER_SLOTS)
    shown = fired[:RASTER_TOKENS]
    original = np.arange(stored.neurons, dtype=np.int32)
    return BlockPictures(
        block=stored.id,
        neurons=stored.neurons,
        slots_per_cell=per_cell,
        raster_tokens=shown.shape[0],
        original=raster(shown, original, per_cell),
        stored=raster(shown, stored.order, per_cell),
        pair_tokens=fired.shape[0],
        original_pairs=co_activation(fired, original, PAIR_CELLS),
        stored_pairs=co_activation(fired, stored.order, PAIR_CELLS),
    )


def _rows(trace: Trace, index: int, tokens: Sequence[TokenRange]) -> npt.NDArray[np.uint8]:
    """The bits of the first tokens at which the block ran: uint8 `[at most PAIR_TOKENS, bytes]`."""
    found: list[npt.NDArray[np.uint8]] = []
    left = PAIR_TOKENS
    for part in tokens:
        ran = trace.tokens_of(trace.info.blocks[index], part.start, part.stop)[:left]
        if ran.size:
            stretch = TokenRange(part.source, part.start, int(ran[-1]) + 1)
            found.append(fired_at(trace, index, [stretch])[ran.astype(np.int64) - part.start])
            left -= ran.size
    return np.concatenate(found) if found else fired_at(trace, index, tokens[:1])[:1]


def raster(fired: npt.NDArray[np.uint8], order: Order, per_cell: int) -> Picture:
    """The share of slots that fire, for each token and for `per_cell` slots at a time.

    Args:
        fired: uint8 `[tokens, n]`, 0 or 1, by neuron.
        order: int32 `[n]`, `order[slot] = neuron`.
    """
    starts = np.arange(0, order.size, per_cell)
    sizes = np.diff(starts, append=order.size)
    counts = np.add.reduceat(fired[:, order], starts, axis=1, dtype=np.int64)
    shares: Picture = (counts / sizes).astype(np.float32)
    return shares


def co_activation(fired: npt.NDArray[np.uint8], order: Order, cells: int) -> Picture:
    """How often two neurons fire together, for how often each fires, over the pairs of different neurons of two cells.

    The sum of f(i, j) over that of sqrt(f(i) f(j)): 1 if all fire at the same tokens. By f(i, j) alone, hot neurons
    would be everyone's partners.

    Args:
        fired: uint8 `[tokens, n]`, 0 or 1, by neuron.
        order: int32 `[n]`, `order[slot] = neuron`.
        cells: Cells that the slots are cut into, as equal as can be; no more than slots.
    """
    starts = (np.arange(min(cells, order.size)) * order.size) // min(cells, order.size)
    frequency = fired.sum(axis=0, dtype=np.int64)[order].astype(np.float64)
    together = np.zeros((starts.size, starts.size))
    # Some tokens at a time: sums are of float64, which is eight times what fires.
    for first in range(0, fired.shape[0], _STRETCH):
        counts = np.add.reduceat(fired[first : first + _STRETCH, order], starts, axis=1, dtype=np.float64)
        together += counts.T @ counts
    roots = np.add.reduceat(np.sqrt(frequency), starts)
    possible = np.outer(roots, roots)
    # A neuron is no pair with itself.
    own = np.add.reduceat(frequency, starts)
    together[np.diag_indices_from(together)] -= own
    possible[np.diag_indices_from(possible)] -= own
    # What is left of a cell with one neuron that fires is rounding.
    shares: Picture = np.where(possible > 0.5, together / np.maximum(possible, 0.5), 0.0).astype(np.float32)
    return shares
