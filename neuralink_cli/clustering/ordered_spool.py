"""A temporary file for ordered blocks: they come in any order, and the placement stores them in that of the trace."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.errors import OutputError
from neuralink_cli.ordering.block_ordering import OrderedBlock, SequenceCosts
from neuralink_cli.placement.placement import HeldOutReads, PlacedBlock


@dataclass(frozen=True, slots=True)
class SpooledBlock:
    """What stays in memory of an ordered block, see `OrderedBlock`, and where its arrays are in the file."""

    chosen: str
    tokens: int
    pinned: int
    held_out: tuple[HeldOutReads, ...]
    start: int
    neurons: int
    links: int
    sequences: int
    compared: tuple[str, ...]


class OrderedSpool(Mapping[str, PlacedBlock]):
    """Takes ordered blocks in any order. By block id it gives back the arrays that a placement stores.

    Only figures are in memory. The file has no name, so a killed run leaves nothing. Use as a context manager.

    Args:
        output: The spool is put beside this file.
        ids: The blocks in the order of the trace.

    Raises:
        OutputError: The file cannot be created.
    """

    def __init__(self, output: Path, ids: Sequence[str]) -> None:
        self._folder = output.absolute().parent
        self._places = {block_id: index for index, block_id in enumerate(ids)}
        self._blocks: dict[int, SpooledBlock] = {}
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        except OSError as error:
            raise self._error(error) from None

    def __enter__(self) -> OrderedSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written is tried once more; of that was told.
        with contextlib.suppress(OSError):
            self._file.close()

    def put(self, index: int, block: OrderedBlock) -> None:
        """Add the block at a place of the trace.

        Raises:
            OutputError: The disk is full.
        """
        placed, costs = block.placed, block.costs
        self._blocks[index] = SpooledBlock(
            block.chosen,
            block.tokens,
            block.pinned,
            block.held_out,
            self._end,
            placed.order.size,
            placed.links.size,
            costs.naive.size,
            tuple(costs.collapsed),
        )
        arrays: list[npt.NDArray[Any]] = [placed.order, placed.frequency, placed.links, costs.naive]
        arrays += costs.collapsed.values()
        try:
            self._file.seek(self._end)
            for array in arrays:
                self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as error:
            raise self._error(error) from None
        self._end += sum(array.nbytes for array in arrays)

    @property
    def blocks(self) -> list[SpooledBlock]:
        """What stays in memory of all blocks, in the order of the trace."""
        return [self._blocks[index] for index in range(len(self._places))]

    def __getitem__(self, block_id: str) -> PlacedBlock:
        block = self._blocks[self._places[block_id]]
        neurons = block.neurons
        self._file.seek(block.start)
        return PlacedBlock(
            self._read(np.int32, neurons), self._read(np.float32, neurons), self._read(np.int32, block.links)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def costs(self, index: int) -> SequenceCosts:
        """What held-out sequences cost in the block at a place of the trace."""
        block = self._blocks[index]
        self._file.seek(block.start + 8 * block.neurons + 4 * block.links)
        naive = self._read(np.float64, block.sequences)
        return SequenceCosts({name: self._read(np.float64, block.sequences) for name in block.compared}, naive)

    def _read(self, dtype: type[Any], count: int) -> npt.NDArray[Any]:
        array = np.empty(count, dtype=dtype)
        self._file.readinto(array.view(np.uint8).data)
        return array

    def _error(self, error: OSError) -> OutputError:
        return OutputError(
            f"the temporary file for orders cannot be written ({error.strerror})",
            where=self._folder,
            fix="free some space there or write elsewhere",
        )
