"""What measuring orders on held-out tokens takes of the time of `cluster`, by neurons of a block and tokens.

python benchmarks/held_out_share.py --folder /tmp
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from synthetic import write_synthetic_trace

from neuralink_cli.activations.trace import Trace
from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.ordering import block_ordering
from neuralink_cli.ordering.block_ordering import BlockOptions, order_block
from neuralink_cli.placement.held_out import split_tokens


@contextmanager
def timed(name: str, seconds: list[float]) -> Iterator[None]:
    """Adds to `seconds` the CPU time of all calls of a function of `block_ordering`."""
    function: Callable[..., Any] = getattr(block_ordering, name)

    def measured(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        found = function(*arguments, **options)
        seconds[0] += time.process_time() - started
        return found

    with mock.patch.object(block_ordering, name, measured):
        yield


def share(folder: Path, neurons: int, tokens: int, options: BlockOptions) -> tuple[float, float]:
    """CPU seconds of `order_block`, and the part of it that measures."""
    path = folder / "trace"
    write_synthetic_trace(path, blocks=1, neurons=neurons, tokens=tokens, hidden=4096, active=0.1)
    measuring = [0.0]
    with Trace(path) as trace, timed("_measure", measuring):
        started = time.process_time()
        order_block(trace, trace.info.blocks[0], split_tokens(trace, 0.2), ("synthetic",), options)
        return time.process_time() - started, measuring[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096, 11008])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--order", nargs="+", default=["linked", "refined"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where traces are written")
    options = parser.parse_args()
    operation = builtin_devices()["ufs4.0"].operation_in_bundles(3 * 4096 * 2)
    print(f"{'order':10}{'neurons':>9}{'tokens':>9}{'CPU s':>9}{'measuring':>11}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for order in options.order:
            chosen = BlockOptions(order=order, pinned=0, operation_in_bundles=operation, effort="normal")
            # Compiled before the clock starts.
            share(Path(folder), 64, 2048, chosen)
            for neurons in options.neurons:
                for tokens in options.tokens:
                    seconds, measuring = share(Path(folder), neurons, tokens, chosen)
                    print(f"{order:10}{neurons:9,}{tokens:9,}{seconds:9.2f}{measuring / seconds:11.1%}", flush=True)


if __name__ == "__main__":
    main()
