"""Layout in, the original checkpoint out: every file byte for byte as it was."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import NeuralinkError, UnsupportedError, VerificationError
from neuralink_cli.files.bulk_io import PAGE
from neuralink_cli.files.durable import new_directory, require_replaceable, require_space, write_file
from neuralink_cli.files.free_memory import remark_if_short
from neuralink_cli.layout.companions import companion_bytes, restore_companions, source_name
from neuralink_cli.layout.open_layout import Layout, check_weight_files, coverage_of, open_layout
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.rewriting.held_memory import restoring_bytes
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.estimate import Estimate, Pass, estimate
from neuralink_cli.streaming.sections import ready, write_sections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoreSummary:
    """What was restored: number of tensors and of weight bytes, and how much of the FFN weights was in blocks."""

    files: tuple[str, ...]
    tensors: int
    bytes: int
    coverage: Coverage


def restore(layout: Path, output: Path, *, overwrite: bool = False, progress: Progress = no_progress) -> RestoreSummary:
    """Write the checkpoint that a layout was made from, every file byte for byte, and log the estimate.

    Raises:
        OutputError: The output exists (without `overwrite`), holds another model, or does not fit on the disk.
        InputError, VerificationError: The layout is damaged.
        UnsupportedError: Its weights are rounded.
    """
    with open_layout(layout) as opened, opened.unreplaced:
        require_exact(opened)
        check_output(opened, output, overwrite)
        expected = estimate_restore(opened, output)
        logger.info("%s", expected)
        remark_if_short(expected.memory_bytes)
        with progress("restore", restore_bytes(opened), "B") as advance:
            return restore_layout(opened, output, overwrite=overwrite, progress=advance)


def restore_layout(
    layout: Layout, output: Path, *, overwrite: bool = False, progress: Callable[[int], object] | None = None
) -> RestoreSummary:
    """As `restore`, for an open layout; `progress` is called with the bytes since the last call.

    Raises:
        OutputError: As `check_output`.
        InputError, VerificationError: The layout is damaged.
        UnsupportedError: Its weights are rounded.
    """
    # Imported here because numba is slow to import and a quick look at a layout does not need it.
    from neuralink_cli.rewriting.unbundling import tensor_sections

    require_exact(layout)
    headers = layout.source_headers
    check_output(layout, output, overwrite)
    check_weight_files(layout, progress)
    with new_directory(output, overwrite=overwrite, replaceable=_holds_source(layout)) as directory:
        copied = restore_companions(layout, directory, progress)
        for name, content in layout.verbatim.items():
            if name not in copied:
                write_file(directory / name, content)
        for name, header in headers.items():
            sections = [ready(header.prelude), *tensor_sections(layout, header.entries)]
            write_sections(directory / name, sections, progress)
        _check_restored(directory, layout)
        # The weights came from files that were open, what is beside them by name: of one and the same layout?
        layout.unreplaced.check()
    tensors = sum(len(header.entries) for header in headers.values())
    return RestoreSummary(tuple(headers), tensors, weight_bytes(layout), coverage_of(layout))


def require_exact(layout: Layout) -> None:
    """Check that the source can be had from a layout.

    Raises:
        UnsupportedError: Its weights are rounded.
    """
    if not layout.exact:
        raise UnsupportedError(
            "has rounded weights, from which the checkpoint cannot be restored",
            where=layout.directory,
            fix="keep the checkpoint, or make a layout that can be restored, with `relayout --weights source`",
        )


def check_output(layout: Layout, output: Path, overwrite: bool) -> None:
    """Check that the source of a layout may be restored to `output` and fits there.

    Raises:
        OutputError: The output exists (without `overwrite`), holds another model, or does not fit on the disk.
    """
    require_replaceable(output, overwrite, _holds_source(layout))
    require_space(output, disk_bytes(layout))


def disk_bytes(layout: Layout) -> int:
    """Bytes of disk that the source of a layout takes, whose files are of whole pages."""
    stated = {source_name(file["name"]): file["bytes"] for file in layout.companions}
    sizes = [header.file_bytes for header in layout.source_headers.values()]
    sizes += {**stated, **{name: len(content) for name, content in layout.verbatim.items()}}.values()
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def loadable_bytes(layout: Layout) -> int:
    """Bytes of disk that `loadable` takes beside a layout."""
    if layout.loadable:
        return 0
    if layout.exact:
        return disk_bytes(layout)
    # Decoded to F32.
    return 4 * sum(prod(entry.shape) for entries in layout.source_entries.values() for entry in entries)


def restore_bytes(layout: Layout) -> int:
    """Bytes that `restore` reads to check the weights of the layout, and those that it then writes."""
    return sum(file.size for file, _ in layout.weight_files) + companion_bytes(layout) + weight_bytes(layout)


def weight_bytes(layout: Layout) -> int:
    """Bytes of the source's weight files."""
    return sum(header.file_bytes for header in layout.source_headers.values())


@contextlib.contextmanager
def loadable(directory: Path) -> Iterator[Path]:
    """A directory from which transformers can load a layout: its own, or a temporary one with the checkpoint.

    Of a layout with rounded weights it is the checkpoint that the layout computes with, decoded to F32.
    """
    with open_layout(directory) as layout:
        if layout.loadable:
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix=".neuralink-", dir=directory.absolute().parent) as folder:
            restored = Path(folder) / "restored"
            if layout.kind == "bundled" and not layout.exact:
                from neuralink_cli.rewriting.decoding import write_decoded

                write_decoded(layout, restored)
            else:
                restore_layout(layout, restored)
            yield restored


def _check_restored(directory: Path, layout: Layout) -> None:
    with Checkpoint(directory) as checkpoint:
        found = checkpoint.fingerprint
    if found != layout.fingerprint:
        raise VerificationError(
            f"restores to a checkpoint with fingerprint {found[:12]}, but its source had {layout.fingerprint[:12]}",
            where=layout.directory,
        )


def _holds_source(layout: Layout) -> Callable[[Path], bool]:
    def holds(directory: Path) -> bool:
        try:
            with Checkpoint(directory) as checkpoint:
                return checkpoint.fingerprint == layout.fingerprint
        except NeuralinkError:
            return False

    return holds


def estimate_restore(layout: Layout, output: Path) -> Estimate:
    """Estimate what `restore` will take; it reads the layout to check it, and then again."""
    files = [file for file, _ in layout.weight_files]
    beside = companion_bytes(layout)
    # In pieces of the files, not of their tensors.
    checking = Pass(files, peak=min(pipeline.AHEAD, max(file.size for file in files)))
    writing = Pass(files, weight_bytes(layout) + beside, other_read=beside, peak=restoring_bytes(layout))
    return estimate([checking, writing], 0, output)
