"""Opens a layout of either kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from neuralink_cli.architectures.coverage import Coverage, find_uncovered
from neuralink_cli.checkpoint.file_names import CONFIG_FILE, FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.checkpoint.model_description import ModelDescription
from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.permuted_layout import PermutedLayout
from neuralink_cli.layout.replaced import Unreplaced
from neuralink_cli.streaming.pipeline import pieces_of, read_ahead

Layout = BundledLayout | PermutedLayout


def open_layout(directory: Path) -> Layout:
    """Open the layout in a directory, whichever kind it is.

    Raises:
        InputError: There is no layout, or it is malformed.
        VerificationError: Its files do not fit each other.
    """
    require_reachable(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError("is a file, not a layout", where=directory, fix="pass the directory that `relayout` wrote")
    if not directory.is_dir():
        raise InputError("no such directory", where=directory, fix="pass the directory that `relayout` wrote")
    with Unreplaced(directory):
        if (directory / FLASH_INDEX).is_file():
            return BundledLayout(directory)
        if (directory / PERMUTED_INDEX).is_file():
            return PermutedLayout(directory)
    raise InputError(
        f"has neither {FLASH_INDEX} nor {PERMUTED_INDEX}, so it is not a layout",
        where=directory,
        fix="pass the directory that `relayout` wrote",
    )


def describe_source(layout: Layout) -> ModelDescription:
    """Describe the checkpoint that a layout was made from, without its weights.

    Raises:
        InputError: The layout has no readable config.json.
    """
    shapes = {entry.name: entry.shape for entries in layout.source_entries.values() for entry in entries}
    return ModelDescription(layout.directory, read_foreign_object(layout.directory / CONFIG_FILE), shapes)


def coverage_of(layout: Layout) -> Coverage:
    """How much of the FFN weights of its source the blocks of a layout cover.

    Raises:
        VerificationError: Its index names a tensor that the source does not have.
    """
    matrices = tuple(layout.matrices())
    entries = {entry.name: entry for stored in layout.source_entries.values() for entry in stored}
    unknown = sorted({matrix.tensor for matrix in matrices} - entries.keys())
    if unknown:
        raise VerificationError(f"has tensor {unknown[0]!r}, which the source does not have", where=layout.directory)
    return find_uncovered(
        entries,
        covered={matrix.tensor for matrix in matrices},
        hidden=frozenset(matrix.hidden for matrix in matrices),
        axes=frozenset(matrix.neuron_axis for matrix in matrices if not matrix.is_down),
        config=read_foreign_object(layout.directory / CONFIG_FILE),
    ).coverage


def check_weight_files(layout: Layout, progress: Callable[[int], object] | None = None) -> None:
    """Read all weight files and compare their digests.

    Args:
        progress: Called with the bytes read since the last call.

    Raises:
        VerificationError: A file was changed after it was written.
    """
    for file, expected in layout.weight_files:
        digest = hashlib.sha256()
        with read_ahead(pieces_of(file, 0, file.size)) as pieces:
            for data in pieces:
                digest.update(data.data)
                if progress is not None:
                    progress(data.size)
        check_digest(file, digest.hexdigest(), expected)


def check_digest(file: TensorFile, found: str, expected: str) -> None:
    """Compare the digest of a file with that in the index.

    Raises:
        VerificationError: They differ.
    """
    if found != expected:
        raise VerificationError(f"SHA-256 is {found}, the index says {expected}", where=file.path)
