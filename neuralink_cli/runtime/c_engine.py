"""Talks to `flash_run`, the runtime in C: token ids go in and out, as examples/c_runtime/README.md describes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from neuralink_cli.errors import InputError, MissingDependencyError, NeuralinkError, OptionError, UnsupportedError

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
class CAnswer:
    """What the program said.

    Attributes:
        tokens: The new tokens.
        memory: Its plan, bytes by what for.
        model: Facts of the open model: kernels, whether reads are direct, ...
        figures: What the prompt and the new tokens took, and the peak of memory.
    """

    tokens: tuple[int, ...]
    memory: dict[str, int]
    model: dict[str, Any]
    figures: dict[str, Any]


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


def run_engine(
    program: Path,
    layout: Path,
    options: Sequence[str],
    prompt: Sequence[int],
    new_tokens: int,
    on_token: Callable[[int], None],
) -> CAnswer:
    """Generate from the tokens of a prompt.

    Args:
        options: Options of the program.
        on_token: Called with each new token as soon as it is there.

    Raises:
        OptionError, InputError, UnsupportedError: What the program answered.
    """
    command = [str(program), *options, "--json", "--", str(layout)]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        raise OptionError(f"cannot be started ({error.strerror})", where=program) from error
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            request = " ".join(map(str, ("generate", new_tokens, *prompt)))
            try:
                process.stdin.write(request + "\n")
                process.stdin.close()
            except BrokenPipeError:
                pass  # It says why, and what it says is read now.
            return _listen(process.stdout, program, layout, on_token)
        except BaseException:
            process.kill()
            raise


def _listen(lines: IO[str], program: Path, layout: Path, on_token: Callable[[int], None]) -> CAnswer:
    tokens: list[int] = []
    documents: dict[str, dict[str, Any]] = {}
    for line in lines:
        word, _, rest = line.rstrip("\n").partition(" ")
        try:
            if word == "error":
                code, _, text = rest.partition(" ")
                raise _ERRORS.get(int(code), InputError)(text, where=layout)
            if word == "token":
                tokens.append(int(rest))
                on_token(tokens[-1])
            else:
                documents[word] = json.loads(rest)
        except ValueError as error:
            raise InputError(
                f"answered {line[:60].strip()!r}, which is not what {PROGRAM} says", where=program
            ) from error
    if not {"memory", "model", "figures"} <= documents.keys():
        raise InputError("stopped before it had answered", where=program, fix="run it by hand to see what it says")
    return CAnswer(tuple(tokens), documents["memory"], documents["model"], documents["figures"])
