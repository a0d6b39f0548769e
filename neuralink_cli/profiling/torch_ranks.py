"""Several processes of a profiling run, started by torchrun: what they exchange with torch.distributed.

Numbers and rows go through a gloo group, whatever device the model runs on. What ranks wait for, and which of them
failed, goes through the store that torchrun keeps: waiting there can be interrupted, and a rank that is gone cannot
make the others wait forever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from neuralink_cli.activations.trace import Bits, Positions
from neuralink_cli.calibration.sources import share_of
from neuralink_cli.errors import MismatchError, OptionError, shorten
from neuralink_cli.files.free_memory import available_memory
from neuralink_cli.profiling.launch import Launch
from neuralink_cli.profiling.meeting import Meeting, lost_connection
from neuralink_cli.profiling.ranks import Ranks, Rows
from neuralink_cli.progress import Progress

T = TypeVar("T")
_LOGGER = logging.getLogger("neuralink_cli")
# Ranks begin what they do together at the same time. But those that send rows wait for the disk of rank 0.
_PATIENCE = timedelta(minutes=30)
# Rows are sent in pieces of this size.
PIECE_BYTES = 1 << 22
_DIFFERENCE_CHARACTERS = 120


class TorchRanks(Ranks):
    """This process among those that torchrun started.

    Use `joined_ranks`, which makes it and tidies up.
    """

    def __init__(self, launch: Launch, meeting: Meeting) -> None:
        self._launch = launch
        self._meeting = meeting
        self._remarks = _Remarks()
        self.rank = launch.rank
        self.count = launch.count
        first = launch.rank - launch.local_rank
        self.here = range(first, first + launch.local_count)
        self.memory = available_memory() // launch.local_count
        # From here on the others may load their models, so the memory had to be looked at before.
        meeting.meet("start")
        _LOGGER.addHandler(self._remarks)
        with lost_connection():
            dist.init_process_group(
                "gloo", store=meeting.store_for("group"), rank=launch.rank, world_size=launch.count, timeout=_PATIENCE
            )

    def close(self) -> None:
        """Stop listening to the log."""
        _LOGGER.removeHandler(self._remarks)

    def device(self, name: str) -> str:
        """As `Ranks.device`: each has a GPU of its own."""
        return device_of(self._launch, name)

    def place(self, output: Path) -> Path:
        """As `Ranks.place`: on another machine than that of rank 0 the folder of the output need not exist."""
        if 0 in self.here or output.absolute().parent.is_dir():
            return output
        return Path(tempfile.gettempdir()) / output.name

    def clear_after_death(self, folder: Path, output: Path | None) -> None:
        """As `Ranks.clear_after_death`."""
        self._meeting.introduce(folder, output)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """As `Ranks.require_same`."""
        facts = {**facts, "the version of torch": str(torch.__version__)}
        require_equal(self.collect({key: json.dumps(value, sort_keys=True) for key, value in facts.items()}))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """As `Ranks.share`: about as many for each rank."""
        return items[share_of(len(items), self.rank, self.count)]

    def progress(self, shown: Progress) -> Progress:
        """As `Ranks.progress`: rank 0 shows it."""

        @contextlib.contextmanager
        def of_all(stage: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
            with self._shown(shown, stage, total, unit) as advance:
                known, key = 0, f"done/{stage}/{self._meeting.round_of(stage)}"

                def refresh(count: int = 0) -> None:
                    nonlocal known
                    done = self._meeting.add(key, count)
                    self._meeting.require_all_well()
                    if done > known and self.rank == 0:
                        advance(done - known)
                        known = done

                yield refresh
                self._meeting.meet(stage, refresh)
                refresh()

        return of_all

    def _shown(
        self, shown: Progress, stage: str, total: int | None, unit: str
    ) -> AbstractContextManager[Callable[[int], object]]:
        return shown(stage, total, unit) if self.rank == 0 else contextlib.nullcontext(lambda _count: None)

    def add_up(self, counts: npt.NDArray[np.int64]) -> None:
        """As `Ranks.add_up`."""
        with lost_connection():
            dist.all_reduce(torch.from_numpy(counts))

    def collect(self, value: T) -> list[T]:
        """As `Ranks.collect`."""
        self._meeting.meet("collect")
        values: list[Any] = [None] * self.count
        with lost_connection():
            dist.all_gather_object(values, value)
        return values

    def send_rows(self, rows: Rows, blocks: Sequence[tuple[int, int]]) -> None:
        """As `Ranks.send_rows`."""
        if self.rank == 0:
            return
        for block, (_, token_bytes) in enumerate(blocks):
            self._send(rows.rows(block))
            if token_bytes:
                self._send(rows.tokens(block))

    def _send(self, chunks: Iterator[npt.NDArray[Any]]) -> None:
        for piece in pieces(chunks, PIECE_BYTES):
            with lost_connection():
                dist.send(torch.from_numpy(piece), 0)

    def all_rows(self, rows: Rows, blocks: Sequence[tuple[int, int]], counts: Sequence[Sequence[int]]) -> Rows:
        """As `Ranks.all_rows`."""
        return RowsOfAll(rows, blocks, counts)

    def pass_on_remarks(self) -> None:
        """As `Ranks.pass_on_remarks`."""
        logged = self.collect(self._remarks.messages)
        for rank, message in new_remarks(logged) if self.rank == 0 else ():
            _LOGGER.warning("rank %d: %s", rank, message)

    def tell(self, value: T) -> T:
        """As `Ranks.tell`."""
        told: list[Any] = [value]
        with lost_connection():
            dist.broadcast_object_list(told, src=0)
        return told[0]  # type: ignore[no-any-return]


class RowsOfAll:
    """The rows of rank 0 and, as they arrive, those of the others."""

    def __init__(self, own: Rows, blocks: Sequence[tuple[int, int]], counts: Sequence[Sequence[int]]) -> None:
        self._own = own
        self._blocks = blocks
        self._counts = counts

    def rows(self, block: int) -> Iterator[Bits]:
        """The rows of a block."""
        yield from self._own.rows(block)
        row_bytes = self._blocks[block][0]
        # Rows may be cut between pieces: they are only written.
        yield from self._received(block, row_bytes)

    def tokens(self, block: int) -> Iterator[Positions]:
        """The tokens of a block's rows."""
        yield from self._own.tokens(block)
        token_bytes = self._blocks[block][1]
        yield from (piece.view("<u4") for piece in self._received(block, token_bytes))

    def _received(self, block: int, row_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        for rank, counts in enumerate(self._counts):
            left = counts[block] * row_bytes if rank else 0
            while left:
                piece = np.empty(min(left, PIECE_BYTES), dtype=np.uint8)
                with lost_connection():
                    dist.recv(torch.from_numpy(piece), rank)
                yield piece
                left -= piece.size


class _Remarks(logging.Handler):
    """Keeps the warnings that this process logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.messages.append(record.getMessage())


def new_remarks(logged: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """What other ranks logged and rank 0 did not, each once, with the first rank that did."""
    known = set(logged[0])
    found = []
    for rank, messages in enumerate(logged):
        for message in messages:
            if message not in known:
                known.add(message)
                found.append((rank, message))
    return found


def device_of(launch: Launch, name: str) -> str:
    """The device of a rank, if `name` was asked for: the GPUs of a machine are dealt to its ranks.

    Raises:
        OptionError: A GPU would have several ranks.
    """
    kind, _, number = name.partition(":")
    if kind == "auto" and torch.cuda.is_available():
        kind = "cuda"
    here = launch.local_count
    if kind != "cuda" or (number and here == 1):
        return name
    if number:
        raise OptionError(f"--device {name} is one GPU for {here} ranks", fix="pass --device cuda: one for each")
    # Where there is none at all, loading the model says so.
    if torch.cuda.is_available() and torch.cuda.device_count() < here:
        raise OptionError(
            f"the {here} ranks on this machine have {torch.cuda.device_count()} GPUs",
            fix="start fewer ranks, or pass --device cpu",
        )
    return f"cuda:{launch.local_rank}"


def require_equal(facts: Sequence[Mapping[str, str]]) -> None:
    """Check that the facts of all ranks are those of rank 0.

    Raises:
        MismatchError: They differ.
    """
    for rank, other in enumerate(facts):
        for key in dict.fromkeys((*facts[0], *other)):
            ours, theirs = facts[0].get(key, "nothing"), other.get(key, "nothing")
            if ours != theirs:
                ours, theirs = (shorten(each, _DIFFERENCE_CHARACTERS) for each in (ours, theirs))
                raise MismatchError(
                    f"ranks 0 and {rank} do not run the same: {key} is {ours} and {theirs}",
                    fix="start all with the same options, on the same model and data",
                )


def pieces(chunks: Iterator[npt.NDArray[Any]], size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of chunks, in pieces that are all of one size except for the last."""
    held = np.empty(size, dtype=np.uint8)
    filled = 0
    for chunk in chunks:
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        while data.size:
            taken = min(size - filled, data.size)
            held[filled : filled + taken] = data[:taken]
            data, filled = data[taken:], filled + taken
            if filled == size:
                yield held
                filled = 0
    if filled:
        yield held[:filled]


@contextlib.contextmanager
def joined_ranks(launch: Launch) -> Iterator[TorchRanks]:
    """Within the block this process is one of those that torchrun started.

    Raises:
        WorkerError: Other ranks did not come, failed, or died.
        Exception: What the block raises. Of all ranks only one is to tell of a failure, see `tells_of_failure`.
    """
    with Meeting(launch) as meeting:
        ranks = TorchRanks(launch, meeting)
        try:
            yield ranks
        finally:
            ranks.close()
        # Not after a failure: that the connection breaks is what tells the others.
        dist.destroy_process_group()
