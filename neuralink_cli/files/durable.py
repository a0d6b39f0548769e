"""Outputs that are either complete or absent: written under a hidden name, flushed, then renamed into place.

A killed run leaves at most a hidden `.NAME.partial`, which the next run for the same output takes over. A lock on it
keeps two runs from writing the same output.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from neuralink_cli.errors import ABOVE_LIMIT, OutputError
from neuralink_cli.files.input_file import kind_of, open_regular, pieces_of_input, why
from neuralink_cli.signals import deferred_signals, raise_lost_signal


def require_free(path: Path, overwrite: bool, *, directory: bool = False, inputs: Iterable[Path | None] = ()) -> None:
    """Check, before any work is done, that an output file or directory may be created at `path`.

    Args:
        inputs: What the output is made from, which is never replaced by it.

    Raises:
        OutputError: It exists and `overwrite` is false, it is an input or of the wrong kind, or its folder does not
            exist.
    """
    _require_replaceable_kind(path)
    made_from = [each for each in inputs if each is not None and each.exists()]
    if overwrite and path.exists() and any(path.samefile(each) for each in made_from):
        raise OutputError("is an input of this command", where=path, fix="choose another output")
    if path.is_symlink() or path.exists():
        if not overwrite:
            raise OutputError("already exists", where=path, fix="choose another output or pass --overwrite")
        if path.is_dir() and not directory:
            raise OutputError("is a directory, but the output is a file", where=path, fix="choose another output")
    elif not path.absolute().parent.is_dir():
        raise OutputError("its folder does not exist", where=path, fix=f"create {path.absolute().parent} first")


def _require_replaceable_kind(path: Path) -> None:
    """Whatever `--overwrite` says, only files and directories are replaced: no device, pipe or socket, no link to one.

    Raises:
        OutputError: `path` is something else, or the system cannot say what it is.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot be written ({why(error)})", where=path) from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OutputError(f"is a {kind_of(mode)}, which is never replaced", where=path, fix="choose another output")


def leftover_bytes(path: Path) -> int:
    """Size of what an unfinished earlier run for the directory `path` left behind."""
    partial = _partial(path)
    files = partial.rglob("*") if partial.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def require_space(path: Path, needed: int) -> None:
    """Check that the file system under `path` (which need not exist yet) has room for `needed` bytes.

    Raises:
        OutputError: There is not enough room.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed:
        raise OutputError(
            f"needs {needed:,} bytes of disk, {free:,} are free", where=path, fix="free some space or write elsewhere"
        )


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path`, whole and durable, when the block ends without an exception.

    The file is unbuffered: use `write_all`.

    Raises:
        OutputError: As `require_free`, or another run is writing this output.
    """
    require_free(path, overwrite)
    partial = _partial(path)
    descriptor = _open_locked(partial, os.O_RDWR | os.O_CREAT, path)
    with os.fdopen(descriptor, "w+b", buffering=0) as handle, named_output(path):
        try:
            handle.truncate(0)
            yield handle
            os.fsync(handle.fileno())
            require_free(path, overwrite)
            raise_lost_signal()
            partial.replace(path)
        except BaseException:
            with deferred_signals():
                partial.unlink(missing_ok=True)
            raise
    sync_directory(path.absolute().parent)


@contextlib.contextmanager
def new_directory(
    path: Path, *, overwrite: bool = False, replaceable: Callable[[Path], bool], keep: bool = False
) -> Iterator[Path]:
    """Yield an empty directory that appears at `path` when the block ends without an exception.

    With `keep`, it contains what a killed run left, and its content stays if the block ends with an exception.

    The caller must flush the files in it (`sync_file`). An existing directory is replaced only if `overwrite` is true
    and `replaceable` says that it is an earlier output; in one step where the system supports that.

    Raises:
        OutputError: As `require_free`; `path` must not be replaced; or another run is writing this output.
    """
    require_replaceable(path, overwrite, replaceable)
    partial = leftover = _partial(path)
    _make_directory(partial, path)
    with named_output(path), contextlib.ExitStack() as locks:
        descriptor = _open_locked(partial, os.O_RDONLY | os.O_DIRECTORY, path)
        locks.callback(os.close, descriptor)
        replaced = False
        if not keep:
            empty_directory(partial)
        try:
            yield partial
            os.fsync(descriptor)
            require_replaceable(path, overwrite, replaceable)
            raise_lost_signal()
            if path.exists():
                # The old directory gets the partial directory's name: a lock keeps other runs from taking it over.
                locks.callback(os.close, _open_locked(path, os.O_RDONLY | os.O_DIRECTORY, path))
                with deferred_signals():
                    leftover = _replace(path, partial)
                    replaced = True
                sync_directory(path.absolute().parent)
                shutil.rmtree(leftover)
            else:
                partial.rename(path)
                shutil.rmtree(_aside(partial), ignore_errors=True)
        except BaseException:
            if replaced or not keep:
                with deferred_signals():
                    shutil.rmtree(leftover, ignore_errors=True)
            raise
    sync_directory(path.absolute().parent)


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Keep other runs from writing into a directory that several outputs are written into, one after the other.

    Raises:
        OutputError: Another run is writing into it.
    """
    descriptor = _open_locked(path, os.O_RDONLY | os.O_DIRECTORY, path)
    try:
        yield
    finally:
        os.close(descriptor)


def require_replaceable(path: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """As `require_free`, for a directory: what `--overwrite` would delete must be an earlier output or empty.

    Raises:
        OutputError: It must not be deleted.
    """
    require_free(path, overwrite, directory=True)
    if not path.exists():
        return
    if path.is_symlink() or not path.is_dir():
        raise OutputError("is not a directory", where=path, fix="choose another output")
    if any(path.iterdir()) and not replaceable(path):
        raise OutputError(
            "is not an earlier output of this kind, so it is not deleted", where=path, fix="choose another output"
        )


@contextlib.contextmanager
def named_output(path: Path) -> Iterator[None]:
    """Errors of the system in the block that name no file are of writing `path`, and say so.

    Raises:
        OutputError: Instead of such an error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full ({why(error)})", where=path, fix="free some space or write elsewhere"
            ) from error
        fix = ABOVE_LIMIT if error.errno == errno.EFBIG else None
        raise OutputError(f"cannot be written ({why(error)})", where=path, fix=fix) from error


def remove_unfinished(path: Path) -> None:
    """Remove what a killed run left of the output file `path`, unless a run is writing it."""
    partial = _partial(path)
    with contextlib.suppress(OSError):
        descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, partial):
                partial.unlink()
        finally:
            os.close(descriptor)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a whole new file inside an output directory, and flush it to the device."""
    with open_new(path) as handle, named_output(path):
        write_all(handle, data)
        os.fsync(handle.fileno())


def copy_file(source: Path, target: Path, progress: Callable[[int], object] | None = None) -> tuple[int, str]:
    """Copy a regular file with its permissions into an output directory, and flush it to the device.

    Args:
        progress: Called with the bytes copied since the last call.

    Returns:
        Bytes and SHA-256 of the copy.

    Raises:
        InputError: The source cannot be read.
    """
    size, digest = 0, hashlib.sha256()
    with open_regular(source) as original, open_new(target) as handle:
        for piece in pieces_of_input(original, source):
            digest.update(piece)
            with named_output(target):
                write_all(handle, piece)
            size += len(piece)
            if progress is not None:
                progress(len(piece))
        with named_output(target):
            _take_permissions(handle.fileno(), original.fileno())
            os.fsync(handle.fileno())
    return size, digest.hexdigest()


def _take_permissions(descriptor: int, original: int) -> None:
    # Its owner, who may be another than that of the original, can always read the copy.
    wanted = os.fstat(original).st_mode & 0o777 | stat.S_IRUSR
    if os.fstat(descriptor).st_mode & 0o777 != wanted:
        # Some file systems have no permissions of files.
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, wanted)


def open_new(path: Path) -> FileIO:
    """An unbuffered new file."""
    return FileIO(path, "x")


def write_all(handle: BinaryIO | FileIO, data: bytes | memoryview) -> None:
    """Write all data to an unbuffered file. One call may write only a part: near a full disk, or at 2 GiB."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += handle.write(view[done:])


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush a directory's names to the device, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def empty_directory(directory: Path, keep: Collection[str] = ()) -> None:
    """Delete everything in a directory except the names in `keep`."""
    for child in directory.iterdir():
        if child.name in keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _partial(path: Path) -> Path:
    return path.absolute().with_name(f".{path.absolute().name}.partial")


def _make_directory(partial: Path, path: Path) -> None:
    try:
        partial.mkdir()
    except FileExistsError:
        return
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=path) from None


def _open_locked(partial: Path, flags: int, path: Path) -> int:
    while True:
        try:
            descriptor = os.open(partial, flags | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=path) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError("another run is writing this output", where=path, fix="wait for it to end") from None
        except OSError:
            # Some network file systems cannot lock (NFS: directories). Write without a lock rather than not at all.
            return descriptor
        # Another run may have renamed the file into place between our open and our lock.
        if _same_file(descriptor, partial):
            return descriptor
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _replace(old: Path, new: Path) -> Path:
    """Replace the directory `old` by `new`, and return where the old one is now.

    This is one step on Linux and macOS, if the file system supports it. Otherwise it takes two renames: a run killed
    between them leaves the old directory beside the output, and the next run deletes it.
    """
    if _exchange_atomically(os.fsencode(new), os.fsencode(old)):
        return new
    aside = _aside(new)
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    return aside


def _aside(partial: Path) -> Path:
    return partial.with_name(partial.name + ".old")


def _exchange_atomically(new: bytes, old: bytes) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        at_fdcwd, rename_exchange = -100, 2
        return bool(libc.renameat2(at_fdcwd, new, at_fdcwd, old, rename_exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        rename_swap = 2
        return bool(libc.renamex_np(new, old, rename_swap) == 0)
    return False
