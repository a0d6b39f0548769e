"""Hands blocks to the workers of a Dask cluster as tasks, and takes the ordered blocks as they are ready.

As many tasks are under way as workers have threads, so that neither this process nor the scheduler holds more. When the
workers of a task ended again and again, it may be its fault or that of one beside it: so its blocks are ordered once
more, one at a time and with nothing else under way. A block that ends its workers then too is named.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuralink_cli.activations.trace import TraceBlock
from neuralink_cli.clustering.dask_cluster import DaskOptions, connected
from neuralink_cli.clustering.dask_worker import (
    BlockTask,
    Failure,
    TaskGroup,
    block_checksum,
    order_on_worker,
    software,
    without_code,
)
from neuralink_cli.clustering.ordering_work import Ordered, OrderingWork
from neuralink_cli.errors import WorkerError, first_line
from neuralink_cli.ordering.block_ordering import OrderedBlock

logger = logging.getLogger(__name__)

# Pairs of neurons times words of tokens that make a task worth sending: about a second on one core.
GROUP_WORK = 1 << 31
# What is lost with a worker, and how many results come at once.
GROUP_BLOCKS = 64
# Of the blocks that are left, a thread takes one in so many groups at a time.
GROUPS_LEFT = 4.0
# How long to wait for workers after the last one is gone, in seconds.
_PATIENCE = 600.0
_LOOK_SECONDS = 1.0
_LOST = "the connection to the Dask scheduler is lost"
_AGAIN = "see why it ended, then start the command again"


def on_dask(work: OrderingWork, options: DaskOptions) -> Ordered:
    """Order blocks on the workers of a Dask cluster.

    Raises:
        WorkerError: A block ended every worker that ordered it, no worker is left, or the scheduler went away.
        NeuralinkError: As `connected`, or whatever ordering a block raises.
    """
    with connected(options) as client, contextlib.closing(_Tasks(client, work, options.send_trace)) as tasks:
        yield from tasks.run()


def take_group(blocks: Sequence[TraceBlock], first: int, tokens: int, threads: int) -> range:
    """Places of the blocks from `first` on that one task orders: neighbours whose work is small.

    The fewer blocks are left for each thread, the smaller the groups, so that all threads end at about the same time.
    """
    most = min(GROUP_BLOCKS, max(int((len(blocks) - first) / (GROUPS_LEFT * threads)), 1))
    work, end = 0, first
    for block in blocks[first : first + most]:
        work += block.neurons**2 * -(-(tokens if block.routed is None else block.routed) // 64)
        if end > first and work > GROUP_WORK:
            break
        end += 1
    return range(first, end)


def _seen_by_workers(trace: Path) -> Path:
    """The path under which workers look for a trace."""
    return trace.absolute()


class _Tasks:
    """The tasks of some work that are under way."""

    def __init__(self, client: Any, work: OrderingWork, send: bool) -> None:
        self._client, self._work, self._send = client, work, send
        # The first block that is in no task yet.
        self._next = 0
        # Blocks to be ordered alone.
        self._suspects: deque[int] = deque()
        self._alone = False
        self._running: dict[Any, Sequence[int]] = {}
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._software = software()
        self._threads = 0
        self._looked = -_LOOK_SECONDS
        self._without: float | None = None
        self._had_workers = False

    def close(self) -> None:
        """Cancel what is under way."""
        if self._running:
            with contextlib.suppress(Exception):
                self._client.cancel(list(self._running), force=True)
            self._running.clear()

    def run(self) -> Ordered:
        """Order all blocks."""
        while self._fill():
            try:
                future = self._done.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._look()
                continue
            places = self._running.pop(future)
            found = self._result(future, places)
            # The worker may forget it now.
            future.release()
            del future
            if found is not None:
                yield from zip(places, found, strict=True)

    def _fill(self) -> bool:
        """Hand in as much as there are threads; whether anything is under way or to be done."""
        self._look()
        if self._suspects or self._alone:
            # One at a time, with nothing beside it.
            if not self._running:
                self._alone = bool(self._suspects)
                if self._suspects:
                    self._submit((self._suspects.popleft(),))
            if self._running:
                return True
        trace, threads = self._work.trace.info, max(self._threads, 1)
        while len(self._running) < threads and self._next < len(trace.blocks):
            places = take_group(trace.blocks, self._next, trace.tokens, threads)
            self._next = places.stop
            self._submit(places)
        return bool(self._running)

    def _submit(self, places: Sequence[int]) -> None:
        group = pickle.dumps(self._group(places), protocol=pickle.HIGHEST_PROTOCOL)
        future = self._client.submit(order_on_worker, self._software, group, pure=False)
        del group
        self._running[future] = places
        future.add_done_callback(self._done.put)

    def _group(self, places: Sequence[int]) -> TaskGroup:
        work, trace = self._work, self._work.trace
        tasks = []
        for place in places:
            block = trace.info.blocks[place]
            options = work.options(block)
            options = replace(options, own=tuple(without_code(own, block) for own in options.own))
            rows = trace.fired(block) if self._send else None
            positions = trace.tokens_of(block) if self._send and block.routed is not None else None
            checksum = None if self._send else block_checksum(trace, block)
            tasks.append(BlockTask(block, options, checksum, rows, positions))
        return TaskGroup(
            _seen_by_workers(trace.path),
            trace.content_sha256,
            trace.info.tokens,
            work.split,
            work.source_names,
            tuple(tasks),
            trace.sequence_starts if self._send else None,
        )

    def _result(self, future: Any, places: Sequence[int]) -> list[OrderedBlock] | None:
        """The blocks of a task that has ended; None if its workers ended, and its blocks have to be tried alone."""
        from distributed.scheduler import KilledWorker

        try:
            found: list[OrderedBlock] | Failure = pickle.loads(future.result())
        except KilledWorker as error:
            if self._alone:
                raise WorkerError(
                    f"block {self._names(places)} ended every worker that ordered it ({first_line(error)})",
                    where=self._work.trace.path,
                    fix="give workers more memory, or see their logs",
                ) from None
            logger.warning("workers ended while they ordered %s: ordering it alone", self._names(places))
            self._suspects.extend(places)
            return None
        except CancelledError:
            if self._client.status != "running":
                raise WorkerError(_LOST, fix=_AGAIN) from None
            raise WorkerError(
                f"the scheduler gave up {self._names(places)}", fix="was it restarted, or the work cancelled?"
            ) from None
        except Exception as error:
            raise WorkerError(
                f"ordering {self._names(places)} failed on a worker ({type(error).__name__}: {first_line(error)})"
            ) from error
        if isinstance(found, Failure):
            raise found.error()
        return found

    def _look(self) -> None:
        """See how many threads there are now, and wait for the first worker, or for some time after the last."""
        now = time.monotonic()
        if now < self._looked + _LOOK_SECONDS:
            return
        self._looked = now
        if self._client.status in ("closing", "closed"):
            raise WorkerError(_LOST, fix=_AGAIN)
        self._threads = sum(self._client.nthreads().values())
        if self._threads:
            self._had_workers, self._without = True, None
            return
        if self._without is None:
            self._without = now
            logger.warning("no worker is %s: waiting for one", "left" if self._had_workers else "there yet")
        if self._had_workers and now > self._without + _PATIENCE:
            places = tuple(place for group in self._running.values() for place in group)
            raise WorkerError(
                f"no worker is left, and none came within {_PATIENCE / 60:.0f} minutes; under way was "
                f"{self._names(places)}"
            )

    def _names(self, places: Sequence[int]) -> str:
        names = [repr(self._work.trace.info.blocks[place].id) for place in places]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
