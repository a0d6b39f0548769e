"""Where ranks meet, and notice what became of the others: keys in the store that torchrun keeps for them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from neuralink_cli.errors import NeuralinkError, WorkerError
from neuralink_cli.files.durable import remove_unfinished
from neuralink_cli.profiling.launch import Launch
from neuralink_cli.signals import Terminated, deferred_signals, fail_undisturbed

_CONNECT = timedelta(seconds=30)
# Later on it is there or gone.
_CONNECT_AGAIN = timedelta(seconds=5)
# Between two looks at whether all have come.
_LOOK_SECONDS = 0.05
# Python and torch are loaded from a disk that all ranks share.
_JOIN_SECONDS = 300.0
_BEAT_SECONDS = 5.0
# A rank that is alive beats, unless its machine hangs.
_SILENT_SECONDS = 180.0
# After a connection broke, the rank that knows why has so long to tell.
_EXPLAIN_SECONDS = 3.0

# So long the others wait until it has told, and then for torchrun, which takes the first that ends for the cause.
_TELL_SECONDS = 10.0
_LEAVE_SECONDS = 2.0

# Whether a process tells of the failure of the run; unknown as long as there is none.
_tells: dict[Launch, bool] = {}


class Meeting:
    """The ranks of a run as they see each other. Use as a context manager; a failure in it is known to all ranks.

    Raises:
        WorkerError: The store cannot be reached.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._store = _connect(launch, _CONNECT)
        self._rounds: dict[str, int] = {}
        self._ended = threading.Event()
        self._beats: dict[int, tuple[int, float]] = {}
        self._looked = time.monotonic()

    def __enter__(self) -> Meeting:
        self.introduce(None, None)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # The signal by which torchrun stops the others must not cut this short, nor what this one may have to tell.
        with deferred_signals(), contextlib.suppress(RuntimeError):
            if error is not None:
                fail_undisturbed()
            self._store.set(f"ended/{self._launch.rank}", "1")
            if error is not None:
                self._fail(error)

    def store_for(self, purpose: str) -> Any:
        """A part of the store for others to use."""
        return PrefixStore(purpose, self._store)

    def introduce(self, folder: Path | None, output: Path | None) -> None:
        """Tell the others on this machine how to see whether this process is there, and what to remove if it is not."""
        leavings = [None if path is None else str(path.absolute()) for path in (folder, output)]
        with lost_connection():
            known = {"pid": os.getpid(), "node": self._launch.node, "leavings": leavings}
            self._store.set(f"process/{self._launch.rank}", json.dumps(known))

    def round_of(self, what: str) -> int:
        """How often all ranks have met for this so far."""
        return self._rounds.get(what, 0)

    def add(self, key: str, count: int) -> int:
        """Add to a number that all ranks share, and return it."""
        with lost_connection():
            return int(self._store.add(key, count))

    def meet(self, what: str, meanwhile: Callable[[], object] | None = None) -> None:
        """Wait until all ranks have come here.

        Args:
            meanwhile: Called again and again.

        Raises:
            WorkerError: A rank failed, or does not answer any more.
        """
        number = self._rounds[what] = self._rounds.get(what, 0) + 1
        key = f"met/{what}/{number}"
        started = time.monotonic()
        come = self.add(key, 1)
        while come < self._launch.count:
            self.require_all_well()
            if what == "start" and time.monotonic() - started > _JOIN_SECONDS:
                raise WorkerError(
                    f"only {come} of {self._launch.count} ranks came within {_JOIN_SECONDS / 60:.0f} minutes",
                    fix="if this is to be one process, unset TORCHELASTIC_RUN_ID",
                )
            if meanwhile is not None:
                meanwhile()
            time.sleep(_LOOK_SECONDS)
            come = self.add(key, 0)

    def require_all_well(self) -> None:
        """Check that no rank is known to have failed.

        Raises:
            WorkerError: One has, was killed on this machine, or has not been heard from for minutes.
        """
        if self.add("failed", 0):
            raise WorkerError("another rank failed")
        now = time.monotonic()
        if now - self._looked < _BEAT_SECONDS:
            return
        self._looked = now
        # Whatever started the ranks may not watch over them.
        with lost_connection():
            dead = self._dead()
        if dead:
            raise _died(sorted(dead), self._launch.count)
        for rank in range(self._launch.count):
            beats = self.add(f"beats/{rank}", 0)
            if beats != self._beats.get(rank, (-1, now))[0]:
                self._beats[rank] = beats, now
            # Before the first beat a rank is still starting, and `meet` has the limit for that.
            elif beats and now - self._beats[rank][1] > _SILENT_SECONDS:
                raise WorkerError(f"rank {rank} has not been heard from for {_SILENT_SECONDS / 60:.0f} minutes")

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(_BEAT_SECONDS):
                self._store.add(f"beats/{self._launch.rank}", 1)

    def _fail(self, error: BaseException) -> None:
        """Clear up after ranks that were killed, and decide who tells.

        Raises:
            WorkerError: They are why this rank failed, and it is the one that tells.
        """
        if isinstance(error, WorkerError):
            self._wait_for_explanation()
        dead = self._dead()
        for folder, output in dead.values():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if output is not None:
                remove_unfinished(Path(output))
        if _claim(self._launch, self._store) and dead and isinstance(error, (WorkerError, Terminated)):
            raise _died(sorted(dead), self._launch.count) from error

    def _wait_for_explanation(self) -> None:
        until = time.monotonic() + _EXPLAIN_SECONDS
        while time.monotonic() < until and not self._store.add("failed", 0) and not self._dead():
            time.sleep(_LOOK_SECONDS)

    def _dead(self) -> dict[int, list[str | None]]:
        """The ranks on this machine that were killed, with the folder and the unfinished output they may have left."""
        found = {}
        for rank in range(self._launch.count):
            if not self._store.check([f"process/{rank}"]) or self._store.check([f"ended/{rank}"]):
                continue
            process = json.loads(self._store.get(f"process/{rank}"))
            if process["node"] == self._launch.node and not _lives(process["pid"]):
                found[rank] = process["leavings"]
        return found


def tell_once(launch: Launch, tell: Callable[[], object]) -> None:
    """Tell of the failure of this process, if no other rank tells of one; else wait until it has told.

    Args:
        tell: Called by the one rank that tells.
    """
    store = None
    # If nobody keeps the store any more: better twice than never.
    with contextlib.suppress(WorkerError, RuntimeError):
        store = _connect(launch, _CONNECT_AGAIN)
        if not _claim(launch, store):
            _wait_until_told(store)
            return
    tell()
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set("told", "1")


def _wait_until_told(store: Any) -> None:
    until = time.monotonic() + _TELL_SECONDS
    while time.monotonic() < until and not store.check(["told"]):
        time.sleep(_LOOK_SECONDS)
    time.sleep(_LEAVE_SECONDS)


@contextlib.contextmanager
def lost_connection() -> Iterator[None]:
    """Turns errors of torch.distributed in the block into one of ours.

    Raises:
        WorkerError: The connection with another rank broke.
    """
    try:
        yield
    except NeuralinkError:
        raise
    except RuntimeError as error:
        raise WorkerError(
            "the connection with the other ranks broke", fix="what torchrun reports on each machine may say why"
        ) from error


def _connect(launch: Launch, patience: timedelta) -> Any:
    try:
        store: Store = next(rendezvous("env://", timeout=patience))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise WorkerError("the store of torchrun cannot be reached") from error
    return PrefixStore(f"neuralink/{launch.attempt}", store)


def _claim(launch: Launch, store: Any) -> bool:
    if launch not in _tells:
        _tells[launch] = store.add("failed", 1) == 1
    return _tells[launch]


def _died(ranks: Sequence[int], count: int) -> WorkerError:
    numbers = ", ".join(map(str, ranks))
    return WorkerError(
        f"rank{'s' if len(ranks) > 1 else ''} {numbers} of {count} died without a message (killed, perhaps for lack of "
        "memory); nothing unfinished was left behind"
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A process that nobody has asked for its exit code yet is still there by name.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True
