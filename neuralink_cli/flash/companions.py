"""The small files beside the weights: copied byte for byte, so that tokenizer and config reach the device untouched."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.checkpoint import FLASH_INDEX, SHARD_INDEX, is_module_file, is_small_file
from neuralink_cli.checkpoint.durable import sync_directory, sync_file
from neuralink_cli.errors import VerificationError
from neuralink_cli.flash.plan import MODEL_CARD

_OWN_FILES = frozenset((SHARD_INDEX, FLASH_INDEX, "model.permuted.json", MODEL_CARD))


def companion_files(directory: Path) -> list[str]:
    """Names of the files of a checkpoint that go with any layout of it, relative to its directory.

    Those are all beside the weights that are no weights, hidden or folders, and all in folders of modules that follow
    the model (sentence-transformers).
    """
    beside = [path for path in directory.iterdir() if is_small_file(path.name) and path.name not in _OWN_FILES]
    in_modules = [path for path in directory.glob("*_*/*") if is_module_file(str(path.relative_to(directory)))]
    return sorted(str(path.relative_to(directory)) for path in [*beside, *in_modules] if path.is_file())


def copy_companions(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy files byte for byte, flushed to the device."""
    folders = set()
    for name in names:
        folder = (target / name).parent
        folder.mkdir(exist_ok=True)
        folders.add(folder)
        shutil.copyfile(source / name, target / name)
        sync_file(target / name)
    for folder in folders - {target}:
        sync_directory(folder)


def describe_companions(directory: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Name (relative to the layout's directory), size and SHA-256 of each file, for the index."""
    contents = {name: (directory / name).read_bytes() for name in names}
    return [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    ]


def check_companions(directory: Path, described: Sequence[Mapping[str, Any]]) -> None:
    """Compare the files beside the weights with what the index says of them.

    Raises:
        VerificationError: One is missing or was changed.
    """
    for expected in described:
        path = directory / expected["name"]
        if not path.is_file():
            raise VerificationError("is missing", where=path)
        if describe_companions(directory, [expected["name"]]) != [expected]:
            raise VerificationError("was changed: its size or SHA-256 is not the index's", where=path)
