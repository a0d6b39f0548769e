"""The outputs of stages on disk: their digests, whether they are as the lock file says, and whose they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from neuralink_cli.activations.trace import Trace
from neuralink_cli.errors import InputError, OutputError
from neuralink_cli.files.input_file import digest_of
from neuralink_cli.files.json_text import canonical
from neuralink_cli.layout.index import is_layout
from neuralink_cli.pipeline.lock import FileDigest, Lock, LockEntry
from neuralink_cli.pipeline.stages import Stage
from neuralink_cli.placement.placement import Placement
from neuralink_cli.progress import Progress, no_progress

# Bytes that take about a tenth of a second to hash.
_WORTH_SHOWING = 1 << 26


def digest_files(root: Path, output: str, progress: Progress) -> dict[str, FileDigest]:
    """The files of an output, by path relative to the build, with size and SHA-256.

    Raises:
        InputError: A file cannot be read.
    """
    paths = list(_files(root, output))
    sizes = [path.stat().st_size for path in paths]
    with _shown(progress, sum(sizes))("hashing", sum(sizes), "B") as advance:
        return {
            path.relative_to(root).as_posix(): FileDigest(size, digest_of(path, advance))
            for path, size in zip(paths, sizes, strict=True)
        }


def damage(root: Path, entry: LockEntry, progress: Progress) -> str | None:
    """In words, how the files of an output differ from what the lock file says; None if they do not. Reads them all."""
    found = {path.relative_to(root).as_posix(): path for path in _files(root, entry.output)}
    missing = next((name for name in entry.files if name not in found), None)
    if missing is not None:
        return f"{missing} is missing"
    total = sum(file.bytes for file in entry.files.values())
    with _shown(progress, total)("checking", total, "B") as advance:
        for name, file in entry.files.items():
            try:
                whole = found[name].stat().st_size == file.bytes and digest_of(found[name], advance) == file.sha256
            except (InputError, OSError):
                whole = False
            if not whole:
                return f"{name} is damaged"
    return None


def _shown(progress: Progress, total: int) -> Progress:
    """Shows nothing of what takes no time."""
    return progress if total >= _WORTH_SHOWING else no_progress


def content_digest(stage: Stage, root: Path, files: Mapping[str, FileDigest]) -> str:
    """The digest of an output that later stages are made from.

    It is the one that a trace or placement states of its content. That of a layout is of the names and digests of its
    files, that of any other output of the file.
    """
    path = root / stage.output
    if stage.name == "profile":
        with Trace(path) as trace:
            return trace.content_sha256
    if stage.name == "cluster":
        with Placement(path) as placement:
            return placement.content_sha256
    if stage.name == "relayout":
        listed = [[name.removeprefix(f"{stage.output}/"), file.sha256] for name, file in files.items()]
        return hashlib.sha256(canonical(listed).encode()).hexdigest()
    return files[stage.output].sha256


def require_own(root: Path, stages: tuple[Stage, ...], lock: Lock) -> None:
    """Check that nothing stands where the stages will write but what the lock file says is the build's.

    Raises:
        OutputError: Something does, or lies among the files of a layout.
    """
    for stage in stages:
        path = root / stage.output
        if stage.device is not None:
            _require_folder(root / stage.device)
        if not os.path.lexists(path):
            continue
        entry = lock.get(stage.output)
        kind = path.is_dir() if stage.name == "relayout" else path.is_file()
        if entry is None or path.is_symlink() or not kind:
            raise OutputError("is not part of this build, so it is not overwritten", where=path, fix="move it away")
        if stage.name == "relayout":
            _require_own_layout(root, path, entry)


def _require_own_layout(root: Path, path: Path, entry: LockEntry) -> None:
    if not entry.files:
        if any(path.iterdir()) and not is_layout(path):
            raise OutputError("is not a layout, so it is not overwritten", where=path, fix="move it away")
        return
    other = next((file for file in _files(root, entry.output) if _name(root, file) not in entry.files), None)
    if other is not None:
        raise OutputError(
            "is not part of this build, so its folder is not overwritten", where=other, fix="move it away"
        )


def _require_folder(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError("is not a directory", where=path, fix="move it away")


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _files(root: Path, output: str) -> Iterator[Path]:
    """All files of an output, in the order of their names; a link to a folder counts as a file."""
    path = root / output
    if not path.is_dir():
        if os.path.lexists(path):
            yield path
        return
    for file in sorted(path.rglob("*"), key=lambda file: file.as_posix()):
        if file.is_symlink() or not file.is_dir():
            yield file
