"""What runs on a worker of a Dask cluster: a few blocks of a trace come in, ordered blocks go out, both as bytes.

Nothing here imports Dask but the question whether the task was cancelled. Errors travel as values, since Dask would
ship an exception with everything it holds.
"""

from __future__ import annotations

import pickle
import socket
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli import __version__, errors
from neuralink_cli.activations.block_rows import BlockRows
from neuralink_cli.activations.trace import SEQUENCE_LENGTHS, Bits, Positions, TraceBlock
from neuralink_cli.errors import InputError, MismatchError, NeuralinkError, WorkerError, first_line
from neuralink_cli.files.json_text import parse_object
from neuralink_cli.files.stage_file import DIGEST_KEY, METADATA_KEY
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.ordering.block_ordering import BlockOptions, OrderedBlock, order_block
from neuralink_cli.ordering.own_orders import OwnOrder, load_order
from neuralink_cli.placement.held_out import TokenSplit

_STRETCH = 1 << 22
SHARE_OR_SEND = "put the trace where all workers see it under this path, or pass --send-trace"


@dataclass(frozen=True, eq=False)
class BlockTask:
    """A block to order; its rows, and for an expert their tokens, if they are sent along, else their checksum."""

    block: TraceBlock
    options: BlockOptions
    checksum: int | None = None
    rows: Bits | None = None
    positions: Positions | None = None


@dataclass(frozen=True, eq=False)
class TaskGroup:
    """Blocks that one task orders.

    Attributes:
        trace: Where workers find the trace.
        content_sha256: Its digest.
        tokens: Its tokens.
        sequence_starts: int64; None if the trace is read, which has them.
    """

    trace: Path
    content_sha256: str
    tokens: int
    split: TokenSplit
    source_names: tuple[str, ...]
    blocks: tuple[BlockTask, ...]
    sequence_starts: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Failure:
    """An error of this package, to be raised again by whoever handed in the task."""

    kind: str
    what: str
    where: str | None
    fix: str | None

    def error(self) -> NeuralinkError:
        """The error."""
        kind: type[NeuralinkError] = getattr(errors, self.kind, WorkerError)
        return kind(self.what, where=self.where, fix=self.fix)


def software() -> dict[str, str]:
    """The versions that must be the same everywhere, or results might differ."""
    return {
        "Python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "neuralink": __version__,
        "numpy": version("numpy"),
        "numba": version("numba"),
    }


def require_same_software(ours: Mapping[str, str], theirs: Mapping[str, str | None], where: str) -> None:
    """Refuse versions that differ.

    Raises:
        MismatchError: They do; names both.
    """
    for name, wanted in ours.items():
        if theirs.get(name) != wanted:
            raise MismatchError(
                f"has {name} {theirs[name]}, but {wanted} is installed here"
                if theirs.get(name)
                else f"does not have {name}; {wanted} is installed here",
                where=where,
                fix="install the same versions everywhere",
            )


def without_code(own: OwnOrder, block: TraceBlock) -> OwnOrder:
    """An order as it is sent: the permutation of this block only, or the name of a function that a worker loads."""
    permutations = None if own.permutations is None else {block.id: own.permutations[block.id]}
    return replace(own, permutations=permutations, function=None)


def order_on_worker(theirs: Mapping[str, str], group: bytes) -> bytes:
    """Order a pickled `TaskGroup`: a pickled list of `OrderedBlock`, or a pickled `Failure`.

    Args:
        theirs: The versions of whoever hands in the task.
    """
    return pickle.dumps(_attempt(theirs, group), protocol=pickle.HIGHEST_PROTOCOL)


def _attempt(theirs: Mapping[str, str], pickled: bytes) -> list[OrderedBlock] | Failure:
    try:
        require_same_software(theirs, software(), f"worker on {socket.gethostname()}")
        group: TaskGroup = pickle.loads(pickled)
        # A worker that is sent the rows need not see the file.
        with nullcontext() if group.sequence_starts is not None else _open_trace(group) as trace:
            return [_order(group, task, trace) for task in group.blocks]
    except NeuralinkError as error:
        return Failure(type(error).__name__, error.what, error.where, error.fix)


def _order(group: TaskGroup, task: BlockTask, trace: TensorFile | None) -> OrderedBlock:
    options = replace(task.options, own=tuple(map(_with_code, task.options.own)))
    block = task.block
    try:
        if trace is not None:
            _require_same_bytes(trace, task)
        rows = _rows_sent(task, group) if trace is None else _rows_on_disk(trace, group, block)
        return order_block(rows, block, group.split, group.source_names, options, _stop_if_cancelled)
    except MemoryError:
        raise WorkerError(f"a worker on {socket.gethostname()} has too little memory for block {block.id!r}") from None
    except (NeuralinkError, CancelledError):
        raise
    except Exception as error:
        raise WorkerError(
            f"block {block.id!r} failed on {socket.gethostname()} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _with_code(own: OwnOrder) -> OwnOrder:
    if own.permutations is not None:
        return own
    found = load_order(own.name)
    if found.origin != own.origin:
        raise MismatchError(
            f"has order {own.name!r} of {found.origin}, but {own.origin} is installed here",
            where=f"worker on {socket.gethostname()}",
            fix="install the same versions everywhere",
        )
    return found


def _open_trace(group: TaskGroup) -> TensorFile:
    """The trace under the path that the workers share.

    Its document and its arrays were checked where the work was handed in; here only that it says to be the same file.

    Raises:
        InputError: It cannot be read here.
        MismatchError: It is another one.
    """
    host = socket.gethostname()
    try:
        opened = TensorFile(group.trace)
    except InputError as error:
        raise InputError(
            f"a worker on {host} cannot read it ({error.what})", where=group.trace, fix=SHARE_OR_SEND
        ) from None
    try:
        document: Mapping[str, Any] = parse_object(opened.header.metadata.get(METADATA_KEY, ""), group.trace)
    except InputError:
        document = {}
    if document.get(DIGEST_KEY) != group.content_sha256:
        opened.close()
        raise MismatchError(f"a worker on {host} sees another file there", where=group.trace, fix=SHARE_OR_SEND)
    return opened


def block_checksum(trace: TensorFile, block: TraceBlock) -> int:
    """CRC-32 of the rows of a block, and for an expert of their tokens, as they are in the file."""
    checksum = 0
    for name in (f"{block.id}.fired", *(() if block.routed is None else (f"{block.id}.tokens",))):
        size = trace.entry(name).nbytes
        for start in range(0, size, _STRETCH):
            checksum = zlib.crc32(trace.read(name, start, min(start + _STRETCH, size)).data, checksum)
    return checksum


def _require_same_bytes(trace: TensorFile, task: BlockTask) -> None:
    """Refuse a block that is another one here than where the work was handed in: a digest in a header proves nothing.

    Raises:
        MismatchError: It is.
    """
    if block_checksum(trace, task.block) != task.checksum:
        raise MismatchError(
            f"a worker on {socket.gethostname()} reads other bytes of block {task.block.id!r} there",
            where=trace.path,
            fix=SHARE_OR_SEND,
        )


def _rows_sent(task: BlockTask, group: TaskGroup) -> BlockRows:
    sent, starts = task.rows, group.sequence_starts
    assert sent is not None
    assert starts is not None
    return BlockRows(lambda start, stop: sent[start:stop], task.positions, group.tokens, starts)


def _rows_on_disk(trace: TensorFile, group: TaskGroup, block: TraceBlock) -> BlockRows:
    lengths = trace.read(SEQUENCE_LENGTHS).view("<u4")
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    positions = None if block.routed is None else trace.read(f"{block.id}.tokens").view("<u4")
    name, size = f"{block.id}.fired", block.row_bytes

    def read(start: int, stop: int) -> Bits:
        return trace.read(name, start * size, stop * size).reshape(stop - start, size)

    return BlockRows(read, positions, group.tokens, starts)


def _stop_if_cancelled() -> None:
    """Stop if nobody waits for the result any more: a thread cannot be interrupted from outside."""
    from distributed import get_worker

    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    if task is None or task.state == "cancelled" or worker.status.name != "running":
        raise CancelledError
