"""How ranks meet and fail: in threads of one process, with a store in memory in place of torchrun's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from neuralink_cli.errors import InputError, WorkerError
from neuralink_cli.profiling import meeting
from neuralink_cli.profiling.launch import Launch
from neuralink_cli.profiling.meeting import Meeting, tell_once
from neuralink_cli.signals import Terminated, stopping_signals


def launch_of(rank: int, count: int = 2) -> Launch:
    return Launch(rank, count, rank, count, node=0, attempt="0")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    kept = HashStore()
    monkeypatch.setattr(meeting, "_connect", lambda _launch, _patience: PrefixStore("x", kept))
    monkeypatch.setattr(meeting, "_tells", {})
    monkeypatch.setattr(meeting, "_EXPLAIN_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "_LEAVE_SECONDS", 0.0)
    return PrefixStore("x", kept)


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def killed(rank: int, monkeypatch: pytest.MonkeyPatch, folder: Path | None, output: Path | None) -> None:
    """A rank that has come, and whose process is gone."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", dead_process)
        Meeting(launch_of(rank)).introduce(folder, output)


def in_both(run: Callable[[Meeting], object]) -> list[BaseException | None]:
    """Run the same in two ranks, and return what each raised."""

    def in_rank(rank: int) -> BaseException | None:
        try:
            with Meeting(launch_of(rank)) as ranks:
                run(ranks)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(in_rank, range(2)))


def test_ranks_wait_for_each_other_every_time() -> None:
    arrived: list[int] = []
    seen: list[int] = []
    lock = threading.Lock()

    def run(ranks: Meeting) -> None:
        for number in (1, 2, 3):
            with lock:
                arrived.append(number)
            ranks.meet("work")
            with lock:
                seen.append(arrived.count(number))

    assert in_both(run) == [None, None]
    assert seen == [2] * 6


def test_the_failure_of_one_rank_ends_the_waiting_of_the_other() -> None:
    failing = iter([True, False])

    def run(ranks: Meeting) -> None:
        if next(failing):
            raise InputError("is bad")
        ranks.meet("work")

    raised = in_both(run)
    assert sorted(type(error).__name__ for error in raised) == ["InputError", "WorkerError"]


def test_ranks_that_do_not_come_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_JOIN_SECONDS", 0.1)
    with pytest.raises(
        WorkerError, match="only 1 of 2 ranks came within 0 minutes; if this is to be one process, unset"
    ):
        Meeting(launch_of(0)).meet("start")


def test_a_rank_that_falls_silent_is_named(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    monkeypatch.setattr(meeting, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "_SILENT_SECONDS", 0.2)
    store.add("beats/1", 7)
    with pytest.raises(WorkerError, match="rank 1 has not been heard from"), Meeting(launch_of(0)) as ranks:
        ranks.meet("work")


def test_a_killed_rank_is_noticed_by_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before it has been silent for minutes, and though nothing stops this rank."""
    monkeypatch.setattr(meeting, "_BEAT_SECONDS", 0.02)
    killed(1, monkeypatch, None, None)
    with pytest.raises(WorkerError, match="rank 1 of 2 died without a message"), Meeting(launch_of(0)) as ranks:
        ranks.meet("work")


@pytest.mark.parametrize("error", [WorkerError("the connection broke"), Terminated()])
def test_what_a_killed_rank_left_is_removed_and_the_rank_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = tmp_path / ".out.weights"
    folder.mkdir()
    (folder / "x").write_bytes(b"x")
    (tmp_path / ".out.partial").write_bytes(b"half")
    (tmp_path / "other").write_bytes(b"kept")
    killed(1, monkeypatch, folder, tmp_path / "out")
    with pytest.raises(WorkerError, match="rank 1 of 2 died without a message"), Meeting(launch_of(0)):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_error_of_its_own_is_told_even_if_another_rank_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed(1, monkeypatch, None, None)
    with pytest.raises(InputError, match="is bad"), Meeting(launch_of(0)):
        raise InputError("is bad")


def test_a_rank_that_has_ended_well_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", dead_process)
        with Meeting(launch_of(1)):
            pass
    with pytest.raises(Terminated), Meeting(launch_of(0)):
        raise Terminated


def test_one_rank_tells_and_the_others_wait_for_it() -> None:
    told: list[tuple[str, int]] = []

    def tell(rank: int) -> None:
        time.sleep(0.1)
        told.append(("told", rank))

    def fail(rank: int) -> None:
        tell_once(launch_of(rank, 3), lambda: tell(rank))
        told.append(("ended", rank))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fail, range(3)))
    assert [what for what, _ in told] == ["told", "ended", "ended", "ended"]


def test_without_a_store_every_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_launch: Launch, _patience: object) -> Any:
        raise WorkerError("the store of torchrun cannot be reached")

    monkeypatch.setattr(meeting, "_connect", nobody)
    told: list[int] = []
    for rank in range(2):
        tell_once(launch_of(rank), partial(told.append, rank))
    assert told == [0, 1]


def test_a_store_that_cannot_be_reached_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(WorkerError, match="the store of torchrun cannot be reached"):
        Meeting(Launch(0, 2, 0, 2, 0, "0"))


def test_a_rank_that_failed_is_not_stopped_before_it_tells() -> None:
    """By the signal that torchrun sends it when another died, though it knows of that by itself."""
    child = os.fork()
    if not child:
        with contextlib.suppress(InputError), stopping_signals(), Meeting(launch_of(0)):
            raise InputError("a failure")
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
