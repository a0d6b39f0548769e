"""Talks to `flash_run`, the runtime in C: token ids go in and out, as examples/c_runtime/README.md describes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from neuralink_cli.errors import (
    InputError,
    MissingDependencyError,
    NeuralinkError,
    OptionError,
    UnsupportedError,
    WorkerError,
)
from neuralink_cli.signals import deferred_signals

PROGRAM = "flash_run"
# In a checkout of the repository; the package does not contain it.
_FOLDER = Path(__file__).parents[2] / "examples/c_runtime"
# What the codes of neuralink.h are here.
_ERRORS: dict[int, type[NeuralinkError]] = {
    1: OptionError,
    2: InputError,
    3: UnsupportedError,
    4: InputError,
    5: OptionError,
}


@dataclass(frozen=True)
class CFacts:
    """What the program says before it is asked anything.

    Attributes:
        memory: Its plan, bytes by what for.
        model: Facts of the open model: kernels, whether reads are direct, ...
    """

    memory: dict[str, int]
    model: dict[str, Any]


def find_engine(path: Path | None) -> Path:
    """The program: `path`, or where `make` puts it in a checkout, or on the search path.

    Raises:
        OptionError: There is no program at `path`.
        MissingDependencyError: It is in none of these places.
    """
    if path is not None:
        found = path / PROGRAM if path.is_dir() else path
        if not found.is_file():
            raise OptionError(
                f"there is no program {PROGRAM}", where=path, fix="build it with `make -C examples/c_runtime`"
            )
        return found
    built = _FOLDER / PROGRAM
    elsewhere = shutil.which(PROGRAM)
    if built.is_file():
        return built
    if elsewhere is None:
        raise MissingDependencyError(
            f"the runtime in C is not built: there is no {PROGRAM}",
            fix=f"run `make -C {_FOLDER if _FOLDER.is_dir() else 'examples/c_runtime'}`, or pass --engine-path",
        )
    return Path(elsewhere)


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        raise OptionError(
            f"cannot be started ({error.strerror})",
            where=command[0],
            fix="pass the program flash_run, which `make -C examples/c_runtime` builds",
        ) from error


class CEngine:
    """A running program with an open layout. Requests are answered one after the other; `close` ends it.

    `peak_bytes` is the most memory that it has held, as of its last answer.
    """

    def __init__(self, program: Path, layout: Path, options: Sequence[str]) -> None:
        """Start the program.

        Raises:
            OptionError, InputError, UnsupportedError: What the program answered; or it cannot be started.
            WorkerError: It ended before it answered; so may every request.
        """
        self._program = program
        self._layout = layout
        self.peak_bytes = 0
        self._process: subprocess.Popen[str] | None = None
        try:
            # A signal must not come between the program and the word for it. Where this process is killed, the
            # program ends as it finds the end of its requests.
            with deferred_signals():
                self._process = _start([str(program), *options, "--end-with-stdin", "--json", "--", str(layout)])
            self.facts = CFacts(self._document("memory"), self._document("model"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the program, whatever it is doing. Harmless when it has ended."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()

    @property
    def _requests(self) -> IO[str]:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _answers(self) -> IO[str]:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    def generate(
        self, prompt: Sequence[int], new_tokens: int, on_token: Callable[[int], None]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Generate from the tokens of a prompt.

        Args:
            on_token: Called with each new token as soon as it is there.

        Returns:
            The new tokens, and what the prompt and they took.

        Raises:
            OptionError, InputError, UnsupportedError: What the program answered.
        """
        self._ask("generate", new_tokens, *prompt)
        tokens: list[int] = []
        while True:
            word, rest = self._answer()
            if word != "token":
                return tuple(tokens), self._figures(word, rest)
            tokens.append(self._whole(rest))
            on_token(tokens[-1])

    def perplexity(self, tokens: Sequence[int]) -> tuple[float, int]:
        """The mean negative log-likelihood of the tokens after the first, and how many these are.

        Raises:
            OptionError, InputError, UnsupportedError: What the program answered.
        """
        self._ask("perplexity", *tokens)
        word, rest = self._answer()
        try:
            mean, count = rest.split()
            found = float(mean), int(count)
        except ValueError as error:
            raise self._strange(f"{word} {rest}") from error
        self._figures(*self._answer())
        return found

    def _ask(self, *words: object) -> None:
        # Where it has ended it says why, and what it says is read next.
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(" ".join(map(str, words)) + "\n")
            self._requests.flush()

    def _answer(self) -> tuple[str, str]:
        """The first word of the next line, and the rest of it. What it says of errors is raised."""
        line = self._answers.readline()
        if not line:
            raise self._ended()
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "error":
            code, _, text = rest.partition(" ")
            raise _ERRORS.get(self._whole(code), InputError)(text, where=self._layout)
        return word, rest

    def _ended(self) -> BaseException:
        """Why there are no more answers."""
        assert self._process is not None
        status = self._process.wait()
        if status == -signal.SIGINT:
            return KeyboardInterrupt()  # Ctrl-C is for both processes, and the program was quicker.
        if status < 0:
            return WorkerError(
                f"was killed by signal {-status} before it answered",
                where=self._program,
                fix="if the system had no memory left, pass a smaller --dram",
            )
        return WorkerError(
            "stopped before it answered",
            where=self._program,
            fix="run it by hand to see what it says, or build it again if it is older",
        )

    def _figures(self, word: str, rest: str) -> dict[str, Any]:
        if word != "figures":
            raise self._strange(f"{word} {rest}")
        found = self._parsed(word, rest)
        self.peak_bytes = found["peak_bytes"]
        return found

    def _document(self, name: str) -> dict[str, Any]:
        word, rest = self._answer()
        if word != name:
            raise self._strange(f"{word} {rest}")
        return self._parsed(word, rest)

    def _parsed(self, word: str, rest: str) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(rest)
        except ValueError as error:
            raise self._strange(f"{word} {rest}") from error
        return document

    def _whole(self, text: str) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise self._strange(f"token {text}") from error

    def _strange(self, line: str) -> InputError:
        return InputError(f"answered {line[:60].strip()!r}, which is not what {PROGRAM} says", where=self._program)
