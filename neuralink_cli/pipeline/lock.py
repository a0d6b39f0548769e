"""The lock file of a build: of every stage what it was made from, by which versions, and the digests of its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.errors import InputError
from neuralink_cli.files.durable import new_file, write_all
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.files.json_text import canonical, read_object
from neuralink_cli.files.schema import Schema, check_document

LOCK_SCHEMA = Schema("lock file", __package__, "lock.schema.json")
TOOL = f"neuralink {__version__}"
_FORMAT, _VERSION = "neuralink-lock", 1
_LONGEST_VALUE = 40
# Without its lock file a folder is no build.
_WAY_OUT = "put the lock file back as it was, or choose another output"


@dataclass(frozen=True)
class FileDigest:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class LockEntry:
    """A stage of a build.

    Attributes:
        device: The device it is for; None if for all.
        output: The file or folder that it makes, relative to the build. A build owns what its lock file lists.
        made_from: Everything that decides what comes out; None until it has been made.
        versions: The versions of the packages that made it.
        digest: The digest of what it made, which later stages are made from; None until it has been made.
        files: Every file of the output, by its path relative to the build.
    """

    stage: str
    device: str | None
    output: str
    made_from: Mapping[str, Any] | None
    versions: Mapping[str, str]
    digest: str | None
    files: Mapping[str, FileDigest]


Lock = dict[str, LockEntry]


def read_lock(path: Path) -> Lock | None:
    """The entries of a lock file by output, in order; None if there is no such file.

    Raises:
        InputError: It is damaged.
    """
    require_reachable(path)
    if not path.exists():
        return None
    try:
        return _entries(read_object(path), path)
    except InputError as error:
        raise InputError(error.what, where=path, fix=error.fix or _WAY_OUT) from None


def _entries(document: dict[str, Any], path: Path) -> Lock:
    if document.get("format") == _FORMAT and document.get("version") != _VERSION:
        raise InputError(
            f"has version {document.get('version')!r}, but this tool reads {_VERSION}",
            where=path,
            fix="use the neuralink that wrote it, or choose another output",
        )
    check_document(document, LOCK_SCHEMA, path)
    entries: Lock = {}
    for stated in document["stages"]:
        files = {name: FileDigest(**file) for name, file in stated["files"].items()}
        if stated["output"] in entries:
            raise InputError(f"lists {stated['output']!r} twice", where=path)
        entries[stated["output"]] = LockEntry(**{**stated, "files": files})
    return entries


def write_lock(path: Path, entries: Lock) -> None:
    """Write a lock file, durably, in place of an earlier one."""
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "tool": TOOL,
        "stages": [asdict(entry) for entry in entries.values()],
    }
    check_document(document, LOCK_SCHEMA, path)
    with new_file(path, overwrite=True) as handle:
        write_all(handle, canonical(document).encode() + b"\n")


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """In words, where two documents differ: `options.effort: normal -> fast`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{place}.{key}" if place else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for k, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}[{k}]")
    elif canonical(before) != canonical(after):
        yield f"{place}: {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
