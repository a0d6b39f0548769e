"""Times reads on the storage that a layout lies on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neuralink_cli.bench.contenders import ContenderBlock
from neuralink_cli.bench.replay import BlockReads
from neuralink_cli.storage.reader import FlashReader


def token_seconds(
    reader: FlashReader,
    blocks: Sequence[ContenderBlock],
    reads: Sequence[BlockReads],
    parts: Sequence[int],
    token: int,
) -> float:
    """Issue the reads of a token, block by block as a model needs them, and return the seconds that they take.

    The content of the bytes does not affect the time: an order that the layout is not stored in is read at the places
    where its bundles would be, within the bundles of the block.

    Args:
        reads: Reads of each block.
        parts: For each block, in how many stretches a bundle is stored; 1 if bundled.
    """
    seconds = 0.0
    for block, of_block, pieces in zip(blocks, reads, parts, strict=True):
        first, count = of_block.of(token)
        if first.size:
            offsets, sizes = read_ranges_of(block, first, count, pieces)
            seconds += reader.read_ranges(offsets, sizes).seconds
    return seconds


def read_ranges_of(
    block: ContenderBlock, first: npt.NDArray[np.int32], count: npt.NDArray[np.int32], parts: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and sizes (int64, bytes) of the reads of slots: one in every part, if bundles are stored in several."""
    assert block.offset is not None
    part_bytes = block.stride // parts
    starts = block.offset + first.astype(np.int64) * part_bytes
    whole = block.neurons * part_bytes
    offsets = (starts[None, :] + whole * np.arange(parts, dtype=np.int64)[:, None]).reshape(-1)
    return offsets, np.tile(count.astype(np.int64) * part_bytes, parts)
