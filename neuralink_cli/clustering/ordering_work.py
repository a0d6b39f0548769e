"""Blocks to order: tasks in, ordered blocks out as they are ready. Who does the work does not change the result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.kernels import available_cpus
from neuralink_cli.ordering.block_ordering import BlockOptions, OrderedBlock, order_block
from neuralink_cli.placement.held_out import TokenSplit
from neuralink_cli.progress import Progress, no_progress


@dataclass(frozen=True)
class OrderingWork:
    """The blocks of an open trace, the tokens to order them on, and how to order each."""

    trace: Trace
    split: TokenSplit
    options: Callable[[TraceBlock], BlockOptions]

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the datasets in the trace."""
        return tuple(source.name for source in self.trace.info.sources)


# Ordered blocks with their places in the trace, in the order in which they are ready.
Ordered = Generator[tuple[int, OrderedBlock], None, None]
# Orders all blocks of some work. Closing the iterator stops what is under way.
Workers = Callable[[OrderingWork], Ordered]


def in_threads(work: OrderingWork, jobs: int | None = None) -> Ordered:
    """Order the blocks in threads of this process, `jobs` at a time; by default as many as CPUs."""
    stop = threading.Event()

    def stop_if_told() -> None:
        if stop.is_set():
            raise CancelledError

    def order(block: TraceBlock) -> OrderedBlock:
        return order_block(work.trace, block, work.split, work.source_names, work.options(block), stop_if_told)

    at_a_time = jobs or available_cpus()
    waiting = enumerate(work.trace.info.blocks)
    running: dict[Future[OrderedBlock], int] = {}
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            while True:
                # No more are handed in than run, so that no result waits long.
                while len(running) < at_a_time and (following := next(waiting, None)) is not None:
                    running[pool.submit(order, following[1])] = following[0]
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            # Only this thread gets Ctrl-C: stop the others, or they would run on for minutes.
            stop.set()


def order_blocks(work: OrderingWork, workers: Workers = in_threads, progress: Progress = no_progress) -> Ordered:
    """Let workers order all blocks of a trace, and show how many are done."""
    with progress("cluster", len(work.trace.info.blocks), "block") as advance, closing(workers(work)) as ordered:
        for index, block in ordered:
            yield index, block
            advance(1)
