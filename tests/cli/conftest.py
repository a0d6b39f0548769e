from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from neuralink_cli.cli.entry import run


@dataclass(frozen=True)
class Outcome:
    """What a command line gave."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The message, if stderr is the one line that an error is."""
        assert self.stdout == ""
        assert self.stderr.startswith("neuralink: error: ")
        assert self.stderr.count("\n") == 1
        assert self.stderr.endswith("\n")
        return self.stderr.removeprefix("neuralink: error: ").rstrip("\n")


Neuralink = Callable[..., Outcome]

COLUMNS = 80
# What nobody can cut: paths, and digests.
_WHOLE = re.compile(r"\S*/\S*|[0-9a-f]{40,}")


def too_wide(text: str) -> list[str]:
    """The lines that a terminal of 80 columns cuts, though paths and digests have no width."""
    return [line for line in text.splitlines() if len(_WHOLE.sub("", line)) > COLUMNS]


def _is_for_people(arguments: list[str], stdout: str) -> bool:
    """Neither JSON, nor a text that a model made."""
    return arguments[:1] != ["run"] and not stdout.startswith(("{", "["))


@pytest.fixture
def neuralink(capsys: pytest.CaptureFixture[str]) -> Iterator[Neuralink]:
    """Runs a command line in this process: `neuralink("verify", model, layout)`.

    Whatever a test is about, what the command prints for people fits a terminal.
    """
    logger = logging.getLogger("neuralink_cli")
    before = logger.handlers[:], logger.propagate, logger.level

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        words = [str(argument) for argument in arguments]
        code = run(words)
        outcome = Outcome(code, *capsys.readouterr())
        if _is_for_people(words, outcome.stdout):
            assert too_wide(outcome.stdout) == []
        return outcome

    yield call
    logger.handlers[:], logger.propagate, logger.level = before


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder for outputs, that must stay empty."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder
