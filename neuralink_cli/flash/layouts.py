"""Opens a layout of either kind."""

from __future__ import annotations

from pathlib import Path

from neuralink_cli.checkpoint.checkpoint import FLASH_INDEX
from neuralink_cli.errors import InputError
from neuralink_cli.flash.bundled_layout import BundledLayout
from neuralink_cli.flash.index import PERMUTED_INDEX
from neuralink_cli.flash.permuted_layout import PermutedLayout

Layout = BundledLayout | PermutedLayout


def open_layout(directory: Path) -> Layout:
    """Open the layout in a directory, whichever it is.

    Raises:
        InputError: There is none, or it is malformed.
        VerificationError: Its files do not fit each other.
    """
    if not directory.is_dir():
        raise InputError("no such directory", where=directory, fix="pass the directory that `relayout` wrote")
    if (directory / FLASH_INDEX).is_file():
        return BundledLayout(directory)
    if (directory / PERMUTED_INDEX).is_file():
        return PermutedLayout(directory)
    raise InputError(f"has neither {FLASH_INDEX} nor {PERMUTED_INDEX}, so it is not a layout", where=directory)
