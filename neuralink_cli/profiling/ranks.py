"""The processes of a profiling run, and what they exchange. Usually there is one, and nothing to exchange."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Bits, Positions
from neuralink_cli.progress import Progress

T = TypeVar("T")


class Rows(Protocol):
    """The recorded rows of every block, and the tokens that they belong to."""

    def rows(self, block: int) -> Iterator[Bits]:
        """The rows of a block, in chunks: uint8 `[rows, row_bytes]`."""

    def tokens(self, block: int) -> Iterator[Positions]:
        """The tokens of the rows of an expert, in chunks: uint32, ascending."""


class Ranks:
    """The processes of a run: this one alone. `TorchRanks` are several.

    Methods that exchange something are called by all ranks, in the same order.

    Attributes:
        rank: The number of this process, from 0. Rank 0 writes the trace.
        count: The number of processes.
        here: The numbers of those on this machine.
        memory: Bytes of free memory that this process may count on; None for all that is free.
    """

    rank = 0
    count = 1
    here = range(1)
    memory: int | None = None

    def device(self, name: str) -> str:
        """The device that this rank runs on, if `name` was asked for.

        Raises:
            OptionError: There is none for this rank.
        """
        return name

    def place(self, output: Path) -> Path:
        """The path whose folder takes the temporary files of this rank: `output` itself, if its folder exists here."""
        return output

    def clear_after_death(self, folder: Path, output: Path | None) -> None:
        """Have other ranks on this machine clear up if this one is killed.

        Args:
            folder: A folder of temporary files.
            output: The output file that it writes, unfinished.
        """

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Check that all ranks have the same facts.

        Raises:
            MismatchError: They differ.
        """

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank processes: consecutive ones, those of all ranks in order make up the whole."""
        return items

    def progress(self, shown: Progress) -> Progress:
        """Progress to which all ranks add. It ends when all have ended."""
        return shown

    def add_up(self, counts: npt.NDArray[np.int64]) -> None:
        """Replace counts by their sums over all ranks."""

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They are small."""
        return [value]

    def send_rows(self, rows: Rows, blocks: Sequence[tuple[int, int]]) -> None:
        """Send the rows of this rank to rank 0, as far as it is another; see `all_rows`.

        Args:
            blocks: For each block the bytes of a row, and of a token of an expert (0 if it has no tokens).
        """

    def all_rows(
        self,
        rows: Rows,
        blocks: Sequence[tuple[int, int]],  # noqa: ARG002 - for ranks that are several
        counts: Sequence[Sequence[int]],  # noqa: ARG002
    ) -> Rows:
        """The rows of all ranks one after the other, at rank 0. They are to be read once, block by block.

        Args:
            rows: Those of this rank.
            blocks: As for `send_rows`.
            counts: For each rank, the number of rows of each block.
        """
        return rows

    def pass_on_remarks(self) -> None:
        """Log at rank 0 the warnings of other ranks that it did not log itself."""

    def tell(self, value: T) -> T:
        """The value that rank 0 has, for all ranks."""
        return value


ALONE = Ranks()
