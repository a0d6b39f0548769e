"""The rows of one block away from its trace: read from a file when they are asked for, or in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Bits, Positions, TraceBlock


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Gives the same answers for one block as its `Trace`.

    Attributes:
        read: Rows from one to another: uint8 `[rows, row_bytes]`.
        positions: For an expert the token of each row, ascending; None for a block that runs on all tokens.
        tokens: Tokens of the trace.
        sequence_starts: int64, ascending.
    """

    read: Callable[[int, int], Bits]
    positions: Positions | None
    tokens: int
    sequence_starts: npt.NDArray[np.int64]

    def tokens_of(self, block: TraceBlock, start: int = 0, stop: int | None = None) -> Positions:
        """See `Trace.tokens_of`."""
        first, last = self.rows(block, start, self.tokens if stop is None else stop)
        return np.arange(first, last, dtype=np.uint32) if self.positions is None else self.positions[first:last]

    def rows(self, _block: TraceBlock, start: int, stop: int) -> tuple[int, int]:
        """See `Trace.rows`."""
        if self.positions is None:
            return start, stop
        first, last = np.searchsorted(self.positions, [start, stop]).tolist()
        return first, last

    def read_rows(self, _block: TraceBlock, first: int, last: int) -> Bits:
        """See `Trace.read_rows`."""
        return self.read(first, last)
