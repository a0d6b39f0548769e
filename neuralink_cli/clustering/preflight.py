"""Estimates what ordering takes: memory and disk, before it starts."""

from __future__ import annotations

import heapq
import logging

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.files.free_memory import remark_if_short, resident_bytes, with_margin
from neuralink_cli.kernels import available_cpus, load_compiler
from neuralink_cli.ordering import refinement
from neuralink_cli.ordering.block_ordering import STRETCH, count_tokens
from neuralink_cli.ordering.counting import STRIPE
from neuralink_cli.ordering.linking import BATCH
from neuralink_cli.placement.held_out import TokenSplit
from neuralink_cli.placement.planned_size import header_bytes, placement_bytes, spool_bytes
from neuralink_cli.sizes import human_bytes
from neuralink_cli.streaming.estimate import Needs

logger = logging.getLogger(__name__)

# What a placement says of a block takes so much more in memory than in its file while it is measured and written.
_IN_MEMORY = 10
# Of a held-out token: its place, in a list for each range and in one of all.
_MEASURED_BYTES = 4
_LISTS = 2
# An entry of a list of partners takes 16 bytes: neuron and count, and both again the other way round.
_PARTNER_BYTES = 16 * refinement.PARTNERS
# Compiled kernels, with what numba keeps beside them, and what threads keep of memory that was freed.
_KERNEL_BYTES = 16 << 20
# A thread keeps what it has freed of arrays up to this size, for its next block: they come from its own heap.
_KEPT_BYTES = 32 << 20
# What a worker of Dask takes beside the programs of this process.
_DASK_BYTES = 64 << 20


def tell_needs(trace: Trace, split: TokenSplit, pinned: float, jobs: int | None, *, stored: bool = True) -> None:
    """Log roughly how much memory and disk it takes to order the blocks of a trace.

    Args:
        pinned: Share of neurons that are left out of the ordering.
        jobs: Blocks ordered at a time; None for one on each CPU.
        stored: Whether a placement is written.
    """
    jobs = _jobs(trace, jobs)
    needs = cluster_needs(trace, split, pinned, jobs)
    logger.info(
        "takes about %s of memory (%s to order %s at a time, the rest for programs)%s",
        human_bytes(needs.memory_bytes),
        human_bytes(_ordering_bytes(trace, split, pinned, jobs)),
        f"{jobs} blocks" if jobs > 1 else "one block",
        f" and {human_bytes(needs.disk_bytes)} of disk" if stored else "",
    )
    remark_if_short(needs.memory_bytes)


def tell_worker_needs(trace: Trace, split: TokenSplit, pinned: float, threads: int, workers: int | None) -> None:
    """Log roughly how much memory each worker of a cluster takes that orders a block at a time.

    Args:
        threads: Threads that a worker counts with.
        workers: Workers on this machine; None if they are elsewhere.
    """
    largest, each = _worker_bytes(trace, split, pinned, threads)
    logger.info(
        "each %s takes about %s of memory (%s to order a block); this process takes %s of disk",
        f"of {workers} workers" if workers else "worker",
        human_bytes(each),
        human_bytes(largest),
        human_bytes(disk_bytes(trace, split)),
    )


def worker_needs(trace: Trace, split: TokenSplit, pinned: float, threads: int, workers: int) -> Needs:
    """What it takes here to order the blocks of a trace on workers of Dask; arguments as `tell_worker_needs`."""
    _, each = _worker_bytes(trace, split, pinned, threads)
    own = with_margin(resident_bytes() + _DASK_BYTES + _IN_MEMORY * header_bytes(trace))
    return Needs(own + workers * each, disk_bytes(trace, split))


def _worker_bytes(trace: Trace, split: TokenSplit, pinned: float, threads: int) -> tuple[int, int]:
    """Bytes to order the largest block, and of the worker that does."""
    load_compiler()
    largest = max((block_bytes(trace, block, split, pinned, threads) for block in trace.info.blocks), default=0)
    largest += max((_kept_bytes(trace, block, split) for block in trace.info.blocks), default=0)
    return largest, with_margin(resident_bytes() + _KERNEL_BYTES + _DASK_BYTES + largest)


def disk_bytes(trace: Trace, split: TokenSplit) -> int:
    """Roughly the bytes of disk that ordering takes: the placement, and beside it the file where orders wait."""
    return placement_bytes(trace) + spool_bytes(trace, split)


def cluster_needs(trace: Trace, split: TokenSplit, pinned: float, jobs: int | None) -> Needs:
    """What it takes to order the blocks of a trace; arguments as `tell_needs`."""
    load_compiler()
    programs = resident_bytes() + _KERNEL_BYTES
    records = _IN_MEMORY * header_bytes(trace)
    ordering = _ordering_bytes(trace, split, pinned, _jobs(trace, jobs))
    return Needs(with_margin(programs + records + ordering), disk_bytes(trace, split))


def _jobs(trace: Trace, jobs: int | None) -> int:
    return min(jobs or available_cpus(), len(trace.info.blocks))


def _ordering_bytes(trace: Trace, split: TokenSplit, pinned: float, jobs: int) -> int:
    """Bytes that ordering so many of the largest blocks at a time takes."""
    blocks = trace.info.blocks
    at_once = sum(heapq.nlargest(jobs, (block_bytes(trace, block, split, pinned) for block in blocks)))
    if jobs < len(blocks):
        at_once += sum(heapq.nlargest(jobs, (_kept_bytes(trace, block, split) for block in blocks)))
    return at_once


def _kept_bytes(trace: Trace, block: TraceBlock, split: TokenSplit) -> int:
    """What a thread has freed and keeps while it orders its next block.

    That is all that it measured held-out tokens with, and holes where pairs were, too small for what comes after them.
    """
    held = _most_held_out(trace, block, split)
    sizes = [_vector_bytes(block, held), *[_MEASURED_BYTES * held] * _LISTS, _pair_bytes(block) // 2]
    return sum(size for size in sizes if size <= _KEPT_BYTES)


def _pair_bytes(block: TraceBlock) -> int:
    """Bytes of the pairs that are linked at a time."""
    return 8 * min(BATCH + max(BATCH, block.neurons), block.neurons**2 // 2)


def _most_held_out(trace: Trace, block: TraceBlock, split: TokenSplit) -> int:
    return max((count_tokens(trace, block, part) for part in split.held_out), default=0)


def _vector_bytes(block: TraceBlock, tokens: int) -> int:
    return block.neurons * 8 * -(-tokens // 64)


def block_bytes(trace: Trace, block: TraceBlock, split: TokenSplit, pinned: float, threads: int | None = None) -> int:
    """Bytes that ordering one block takes at its peak.

    Its bit vectors are there all the time. Beside them are, one after the other: some rows of the trace that they are
    made from; the vectors selected to count, the counts and the pairs to link; the refinement's padded copy, two rows
    longer, while it is made from another one with a row of indexes; the vectors of the held-out tokens of a source, and
    a stretch of them. As many threads count as `threads` says, by default one on each CPU.
    """
    tokens = count_tokens(trace, block, split.ordering)
    held = _most_held_out(trace, block, split)
    vectors = _vector_bytes(block, tokens)
    row = 8 * -(-tokens // 64)
    rows = block.row_bytes * 2 * min(STRETCH, tokens)
    stripes = (threads or available_cpus()) * STRIPE * block.neurons * (2 if tokens < 1 << 16 else 4)
    pairs = _pair_bytes(block)
    partners = _PARTNER_BYTES * block.neurons
    beside = max(rows, vectors + pairs + stripes, 2 * vectors + 3 * row + partners, partners + stripes)
    selected = vectors if pinned else 0
    beside = max(beside, _vector_bytes(block, held) + _LISTS * _MEASURED_BYTES * held + rows)
    return vectors + selected + beside
