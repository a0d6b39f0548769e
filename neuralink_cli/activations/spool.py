"""A temporary file for bits: the model makes them batch by batch, the trace stores them block by block."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Bits
from neuralink_cli.errors import OutputError

TOKEN_BYTES = 4


class Spool:
    """Takes rows of any block in any order, and gives back the rows of one block in the order they came.

    Only the position of each chunk is in memory. The file has no name, so a killed run leaves nothing. Use as a context
    manager.

    Args:
        output: The spool is put beside this file.
        row_bytes: Bytes of a row, for each block.

    Raises:
        OutputError: The file cannot be created.
    """

    def __init__(self, output: Path, row_bytes: list[int]) -> None:
        self._output = output
        self._row_bytes = row_bytes
        # First the rows of each block, then the tokens of these rows.
        self._starts = [array("q") for _ in range(2 * len(row_bytes))]
        self._rows = [array("q") for _ in range(2 * len(row_bytes))]
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=output.absolute().parent, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._error(error) from None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, block: int, rows: Bits) -> None:
        """Add rows of a block, uint8 `[rows, row_bytes]`.

        Raises:
            OutputError: The disk is full.
        """
        if rows.shape[1] != self._row_bytes[block]:
            raise ValueError(f"rows of block {block} have {rows.shape[1]} bytes, not {self._row_bytes[block]}")
        self._append(block, rows)

    def append_tokens(self, block: int, tokens: npt.NDArray[np.int32]) -> None:
        """Add the tokens that the last rows of a block belong to.

        Raises:
            OutputError: The disk is full.
        """
        self._append(len(self._row_bytes) + block, tokens.view(np.uint8).reshape(tokens.size, TOKEN_BYTES))

    def count(self, block: int) -> int:
        """The number of rows of a block."""
        return sum(self._rows[block])

    def rows(self, block: int) -> Iterator[Bits]:
        """The rows of a block, in chunks as they came."""
        return self._chunks(block, self._row_bytes[block])

    def tokens(self, block: int) -> Iterator[npt.NDArray[np.uint32]]:
        """The tokens of a block's rows, in chunks as they came."""
        return (chunk.reshape(-1).view("<u4") for chunk in self._chunks(len(self._row_bytes) + block, TOKEN_BYTES))

    def _append(self, stream: int, rows: Bits) -> None:
        try:
            self._file.seek(self._end)
            left = np.ascontiguousarray(rows).reshape(-1).data
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._error(error) from None
        self._starts[stream].append(self._end)
        self._rows[stream].append(rows.shape[0])
        self._end += rows.nbytes

    def _chunks(self, stream: int, row_bytes: int) -> Iterator[Bits]:
        for start, count in zip(self._starts[stream], self._rows[stream], strict=True):
            self._file.seek(start)
            yield np.frombuffer(self._file.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)

    def _error(self, error: OSError) -> OutputError:
        return OutputError(
            f"its temporary file cannot be written ({error.strerror})",
            where=self._output.parent,
            fix="free some space there or write elsewhere",
        )
