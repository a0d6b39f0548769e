"""`profile` under torchrun: two ranks on the CPU write what one process writes, or nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from neuralink_cli import __main__
from neuralink_cli.cli.exit_codes import OUTPUT
from tests.cli.conftest import Neuralink
from tests.conftest import ModelFactory
from tests.failing_rank import install
from tests.processes import Command
from tests.tiny_models import TEXT


@dataclass(frozen=True)
class Ended:
    """What torchrun and its ranks gave. Only lines of ours are kept: torchrun's report of a failure is long."""

    code: int
    stdout: str
    lines: list[str]
    report: str


def ended_with(code: int, stdout: str, stderr: str) -> Ended:
    ours = ("neuralink: ", "loading ", "tokenizing: ", "calibrating ", "recording: ", "writing: ")
    return Ended(code, stdout, [line for line in stderr.splitlines() if line.startswith(ours)], stderr)


def torchrun(*arguments: object) -> Ended:
    """torchrun's own command line, in a process that has torch already, and so have the ranks that are forked from it.

    That another hash seed changes nothing is seen in `tests/cli/test_announced_memory.py`.
    """
    options = ["--standalone", "--nproc-per-node", 2, "--start-method", "fork", "--run-path", __main__.__file__]
    command = Command(*options, *arguments, program=_torchrun)
    stdout, stderr = command.communicate()
    return ended_with(command.wait(), stdout, stderr)


def _torchrun() -> None:
    from torch.distributed.run import main as launch

    launch(sys.argv[1:])
    sys.exit(0)


def forked_by_torchrun(failure: str, *arguments: object) -> Ended:
    """What torchrun does once it has read its options, with ranks that have torch already: one of them fails."""
    command = Command(*arguments, program=partial(_launch, failure))
    stdout, stderr = command.communicate()
    return ended_with(command.wait(), stdout, stderr)


def _launch(failure: str) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    ranks = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(ranks, _failing_rank)(failure)


def _failing_rank(failure: str) -> None:
    install(failure)
    __main__.main()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[::-1])
    return ["--dataset", str(folder / "a.txt"), "--dataset", str(folder / "b.txt")]


def test_two_ranks_write_the_trace_of_one_process(
    model: ModelFactory, neuralink: Neuralink, datasets: list[str], tmp_path: Path
) -> None:
    # Experts of SiLU: thresholds are calibrated, and tokens have numbers.
    options = [model("mixtral"), *datasets, "--active-ratio", "0.25", "--calibration-tokens", "150"]
    options += ["--batch-size", "2", "--max-seq-length", "16", "--device", "cpu", "--json"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = neuralink("profile", *options, "-o", tmp_path / "one/trace", "-q")
    ranks = torchrun("profile", *options, "-o", tmp_path / "two/trace")
    assert (alone.code, ranks.code) == (0, 0), ranks.report
    assert (tmp_path / "two/trace").read_bytes() == (tmp_path / "one/trace").read_bytes()
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["trace"]
    told, expected = json.loads(ranks.stdout), json.loads(alone.stdout)
    assert {**told, "output": None} == {**expected, "output": None}
    # Each step is shown once, with what all ranks do.
    remark, *steps = ranks.lines
    assert remark.startswith("neuralink: each of 2 ranks takes about ")
    assert f"recording: {told['tokens']:,} tokens" in steps
    (done,) = (step for step in steps if step.startswith("recording: done"))
    assert f"done, {told['tokens']:,} tokens in" in done
    assert len(steps) == len(set(steps)) == 10


@pytest.fixture
def failing(model: ModelFactory, datasets: list[str], outputs: Path) -> list[object]:
    return [model("opt"), *datasets, "--batch-size", "1", "--device", "cpu", "-q", "-o", outputs / "trace"]


def test_a_rank_that_dies_is_told_once_and_nothing_is_left(failing: list[object], outputs: Path) -> None:
    """The unfinished trace of rank 0 is removed by the other, which torchrun stops meanwhile."""
    ended = forked_by_torchrun("0:write:die", "profile", *failing)
    assert ended.code != 0
    (line,) = ended.lines
    assert line.startswith("neuralink: error: rank 0 of 2 died without a word"), line
    assert ended.stdout == ""
    # torchrun names what it takes for the cause, and has a traceback of its own.
    assert "exitcode  : -9" in ended.report
    assert sum(line.startswith("Traceback") for line in ended.report.splitlines()) == 1
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "error", "code", "watched"),
    [
        # As if torchrun's agent were gone too.
        ("1:record:die", "rank 1 of 2 died without a word", -9, False),
        ("1:record:fail", "rank 1: ", OUTPUT, True),
    ],
)
def test_ranks_of_which_one_failed_tell_of_it_once(
    failing: list[object], outputs: Path, failure: str, error: str, code: int, watched: bool
) -> None:
    # What torchrun does, without waiting for torch to be loaded three times: it keeps the store, and stops the others.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Command("profile", *failing, prepare=partial(_be_rank, rank, store.port, failure)) for rank in range(2)]
    until = time.monotonic() + 60
    while None in (codes := [rank.poll() for rank in ranks]):
        if (watched and any(codes)) or time.monotonic() > until:
            for rank in ranks:
                rank.send_signal(signal.SIGTERM if time.monotonic() < until else signal.SIGKILL)
        time.sleep(0.2)
    told = [line for rank in ranks for text in rank.communicate() for line in text.splitlines()]
    (line,) = told
    assert line.startswith(f"neuralink: error: {error}"), line
    assert codes[1] == code
    assert codes[0]
    assert list(outputs.iterdir()) == []


def _be_rank(rank: int, port: int, failure: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    install(failure)
