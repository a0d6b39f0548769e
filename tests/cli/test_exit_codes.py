from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from neuralink_cli import errors
from neuralink_cli.cli import architectures, exit_codes
from neuralink_cli.cli.exit_codes import EXIT_CODE_MEANINGS, exit_code
from tests.cli.conftest import Neuralink

ROOT = Path(__file__).parents[2]
CODES: dict[type[errors.NeuralinkError], int] = {
    errors.VerificationError: 1,
    errors.OptionError: 2,
    errors.InputError: 3,
    errors.UnsupportedError: 4,
    errors.MismatchError: 5,
    errors.OutputError: 6,
    errors.MissingDependencyError: 7,
    errors.WorkerError: 9,
}


def test_every_error_has_its_code() -> None:
    assert set(CODES) == set(errors.NeuralinkError.__subclasses__())
    for kind, code in CODES.items():
        assert exit_code(kind("what")) == code
        assert code in EXIT_CODE_MEANINGS


def test_every_code_is_explained_and_in_the_reference() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert set(EXIT_CODE_MEANINGS) == {0, *codes}
    reference = (ROOT / "docs/cli.md").read_text()
    assert dict(re.findall(r"^\| (\d+) \| (.+) \|$", reference, re.MULTILINE)) == {
        str(code): meaning for code, meaning in EXIT_CODE_MEANINGS.items()
    }


def test_a_subclass_has_the_code_of_its_class() -> None:
    class Special(errors.MismatchError):
        pass

    assert exit_code(Special("what")) == 5


RAISED: list[tuple[BaseException, int, str]] = [
    *((kind("is wrong", where="x", fix="do y"), code, "x: is wrong; do y") for kind, code in CODES.items()),
    (errors.InputError("two\nlines and\ttabs"), 3, "two lines and tabs"),
    (KeyboardInterrupt(), 130, "interrupted; nothing unfinished was left behind"),
    (MemoryError(), 8, "out of memory; try smaller batches or fewer jobs"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 8, "out of memory; try smaller batches or fewer jobs"),
    (OSError(errno.ENOSPC, "No space left on device"), 6, "the disk is full; free some space or write elsewhere"),
    (
        OSError(errno.EFBIG, "File too large"),
        6,
        "a file would become larger than allowed (File too large); "
        "raise the limit on the size of files (`ulimit -f`), or write to another file system",
    ),
    (
        OSError(errno.EIO, "Input/output error"),
        6,
        "reading or writing failed (Input/output error); check the storage, and where stdout goes",
    ),
    (OSError(errno.EIO, os.strerror(errno.EIO), "some/file"), 6, "some/file: Input/output error"),
    (PermissionError(errno.EACCES, "Permission denied", "some/file"), 6, "some/file: Permission denied"),
    (
        RuntimeError("two\nlines"),
        70,
        "internal error (RuntimeError: two lines); "
        "this is a bug, please report it with the output of NEURALINK_DEBUG=1",
    ),
]


@pytest.mark.parametrize(("error", "code", "message"), RAISED)
def test_whatever_is_raised_becomes_one_line(
    neuralink: Neuralink, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(**_options: object) -> None:
        raise error

    monkeypatch.setattr(architectures.command, "callback", fail)
    outcome = neuralink("architectures")
    assert (outcome.code, outcome.error) == (code, message)


def test_errors_say_what_where_and_what_to_do() -> None:
    error = errors.OutputError("already exists", where=Path("a/b"), fix="pass --overwrite")
    assert (error.what, error.where, error.fix) == ("already exists", "a/b", "pass --overwrite")
    assert str(error) == "a/b: already exists; pass --overwrite"
    assert str(errors.OutputError("what")) == "what"
