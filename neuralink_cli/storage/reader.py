"""Reads bundles of neurons out of a bundled layout, as a runtime does for every token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes, Offsets
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.errors import VerificationError
from neuralink_cli.files.bulk_io import aligned_buffer
from neuralink_cli.kernels import kernel
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.storage import io_kernels
from neuralink_cli.storage.direct_io import ScatteredFile
from neuralink_cli.storage.read_planning import ReadPlan, as_slots, plan_cheapest, plan_with_gap


@dataclass(frozen=True, eq=False)
class BundleReads:
    """The result of a request for bundles.

    `bundles` is uint8 `[rows, stride]`, one row for every slot that was read, including collapsed gaps; `slots`
    int32 `[rows]` lists them, ascending; `wanted` int32 `[asked]` is the row of each slot asked for. `bytes_read`
    counts whole device blocks, `bytes_useful` the bundles asked for; `seconds` is the time of the reads alone.
    """

    bundles: Bytes
    slots: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int32]
    reads: int
    bytes_read: int
    bytes_useful: int
    seconds: float


@dataclass(frozen=True, eq=False)
class RangeReads:
    """The result of a request for ranges: `data` is uint8, one range after the other; the rest as in `BundleReads`."""

    data: Bytes
    bytes_read: int
    seconds: float


class FlashReader:
    """An open bundled layout for a runtime. Use as a context manager; any number of threads may read at once.

    Attributes:
        index: The layout's index.
        blocks: Its blocks.
        direct: Whether reads go past the page cache.
        queue_depth: Reads kept in flight by each request, which several threads may make at once.

    Args:
        device: Device that reads are planned for; by default, gaps of up to the block's `collapse_gap` are read across.
        direct: None for direct I/O where the file system has it; True to insist.

    Raises:
        InputError: Index or file is missing or malformed, or there is no direct I/O and `direct` is True.
        VerificationError: Index and file do not fit each other.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: DeviceModel | None = None,
        direct: bool | None = None,
        queue_depth: int = 32,
    ) -> None:
        self.device = device
        self._layout = BundledLayout(directory)
        self.index = self._layout.index
        self.blocks = self.index.blocks
        try:
            self._file = ScatteredFile(self._layout.file.path, direct=direct, queue_depth=queue_depth)
        except BaseException:
            self._layout.file.close()
            raise
        if self._file.size != self._layout.file.size:
            self.close()
            raise VerificationError("was replaced while it was being opened", where=self._layout.file.path)
        self.direct = self._file.direct
        self.block_bytes = self._file.block_bytes
        self.queue_depth = queue_depth

    def __enter__(self) -> FlashReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the layout; harmless when closed already. No read may be under way."""
        self._file.close()
        self._layout.file.close()

    def block(self, block_id: str) -> FlashBlock:
        """The block with an id.

        Raises:
            KeyError: There is no such block.
        """
        for block in self.blocks:
            if block.id == block_id:
                return block
        raise KeyError(block_id)

    def plan(self, block: FlashBlock, slots: npt.ArrayLike) -> ReadPlan:
        """The reads that `read_bundles` issues for these slots by default."""
        if self.device is None:
            return plan_with_gap(slots, block.collapse_gap)
        return plan_cheapest(slots, block.stride, self.device)

    def read_bundles(self, block: FlashBlock, slots: npt.ArrayLike, plan: ReadPlan | None = None) -> BundleReads:
        """Read the bundles in some slots of a block.

        Args:
            slots: Integers `[asked]`, ascending, each once.
            plan: The reads to issue, which must cover the slots.

        Raises:
            ValueError: The slots are not ascending or outside the block, or the plan does not cover them.
            InputError: The device fails, or the file was truncated after it was opened.
        """
        asked = as_slots(slots)
        if asked.size and asked[-1] >= block.neurons:
            raise ValueError(f"slot {asked[-1]} lies outside {block.id}, which has {block.neurons}")
        if plan is None:
            plan = self.plan(block, asked)
        _check_plan(plan, block)
        rows = np.empty(plan.rows, dtype=np.int32)
        wanted = np.empty(asked.size, dtype=np.int32)
        if not _locate(plan.first, plan.count, asked, rows, wanted):
            raise ValueError("the plan does not cover the slots")
        offsets = block.bundles.offset + plan.first.astype(np.int64) * block.stride
        brought = self.read_ranges(offsets, plan.count.astype(np.int64) * block.stride)
        return BundleReads(
            bundles=brought.data.reshape(rows.size, block.stride),
            slots=rows,
            wanted=wanted,
            reads=plan.reads,
            bytes_read=brought.bytes_read,
            bytes_useful=asked.size * block.stride,
            seconds=brought.seconds,
        )

    def read_ranges(self, offsets: Offsets, sizes: Offsets, buffer: Bytes | None = None) -> RangeReads:
        """Read any ranges of the flash file, each as one read; with direct I/O each is widened to whole device blocks.

        Args:
            offsets, sizes: int64 `[reads]`, in bytes.
            buffer: Memory to use again, from `range_buffer`; by default the memory is new.

        Raises:
            ValueError: A range lies outside the file, or the buffer is too small.
            InputError: The device fails, or the file was truncated after it was opened.
        """
        offsets, sizes = (np.ascontiguousarray(a, dtype=np.int64) for a in (offsets, sizes))
        if offsets.ndim != 1 or offsets.shape != sizes.shape:
            raise ValueError("offsets and sizes must be one-dimensional and of the same length")
        if offsets.size and (offsets.min() < 0 or sizes.min() < 1 or (offsets + sizes).max() > self._file.size):
            raise ValueError("a range lies outside the file")
        unit = self._file.block_bytes
        lead = offsets % unit
        widened = lead + sizes + -(lead + sizes) % unit
        places = np.cumsum(widened) - widened
        total = int(widened.sum())
        if buffer is None:
            buffer = aligned_buffer(total)
        elif buffer.size < total:
            raise ValueError(f"a buffer of {buffer.size:,} bytes is too small for {total:,}")
        seconds = self._file.read(offsets - lead, widened, buffer, places)
        useful = int(sizes.sum())
        if useful != total:
            io_kernels.pack(buffer, places + lead, sizes)
        return RangeReads(buffer[:useful], total, seconds)

    def range_buffer(self, sizes: Offsets) -> Bytes:
        """Memory that `read_ranges` can use for ranges of these sizes, wherever they start."""
        return aligned_buffer(int(np.sum(sizes)) + 2 * self._file.block_bytes * len(sizes))

    def resident(self, block: FlashBlock) -> dict[tuple[str, str], Bytes]:
        """The tensors of a block that are kept in DRAM, uint8, by role and kind (see `ResidentTensor`)."""
        return {(kept.role, kept.kind): self._layout.file.read(kept.place.tensor) for kept in block.resident}

    def order(self, block: FlashBlock) -> npt.NDArray[np.int32]:
        """The neuron in each slot, int32 `[n]`."""
        return self._layout.order(block.id)

    def frequency(self, block: FlashBlock) -> npt.NDArray[np.float32]:
        """How often the neuron in each slot fired in calibration, float32 `[n]`."""
        return self._layout.file.read(block.frequency.tensor).view("<f4")


def _check_plan(plan: ReadPlan, block: FlashBlock) -> None:
    first, count = plan.first, plan.count
    if not first.size:
        return
    ends = first + count
    if first[0] < 0 or ends[-1] > block.neurons or count.min() < 1 or (first[1:] < ends[:-1]).any():
        raise ValueError(f"the plan's reads are not ascending, disjoint and inside {block.id}")


@kernel
def _locate(first: Any, count: Any, asked: Any, rows: Any, wanted: Any) -> Any:
    """Write the slot of every row and the row of every slot asked for; return whether all were read."""
    row = position = 0
    for read in range(first.size):
        for slot in range(first[read], first[read] + count[read]):
            rows[row] = slot
            if position < asked.size and asked[position] == slot:
                wanted[position] = row
                position += 1
            row += 1
    return position == asked.size
