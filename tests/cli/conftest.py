from __future__ import annotations

import logging
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


@pytest.fixture
def neuralink(capsys: pytest.CaptureFixture[str]) -> Iterator[Neuralink]:
    """Runs a command line in this process: `neuralink("verify", model, layout)`."""
    logger = logging.getLogger("neuralink_cli")
    before = logger.handlers[:], logger.propagate, logger.level

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    yield call
    logger.handlers[:], logger.propagate, logger.level = before


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder for outputs, that must stay empty."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder
