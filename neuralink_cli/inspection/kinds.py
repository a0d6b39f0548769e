"""Tells what kind of artefact lies at a path, from names and headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.file_names import CONFIG_FILE, FLASH_INDEX, PERMUTED_INDEX, SHARD_INDEX, SINGLE_FILE
from neuralink_cli.devices.fio import is_fio_output, read_measurements
from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import open_input, require_reachable
from neuralink_cli.files.json_text import parse_object
from neuralink_cli.files.lfs import is_lfs_pointer
from neuralink_cli.files.stage_file import METADATA_KEY
from neuralink_cli.files.tensor_file import TensorFile

CHECKPOINT = "checkpoint"
TRACE = "trace"
PLACEMENT = "placement"
BUNDLED_LAYOUT = "bundled layout"
PERMUTED_LAYOUT = "permuted layout"
DEVICE = "device profile"
FIO = "fio output"
ARCHITECTURE = "architecture"
# Those that hold an order of neurons.
PLACED_KINDS = (PLACEMENT, BUNDLED_LAYOUT, PERMUTED_LAYOUT)

# No device profile, fio output or architecture is larger.
_LARGEST_JSON = 1 << 24
# fio prints notes before its JSON.
_LIKE_JSON = re.compile(rb"\s*\{|(fio|note|warning)\b", re.IGNORECASE)
_SHOWN = 5
_WANTED = "a checkpoint, trace, placement, layout, device profile or architecture"


@dataclass(frozen=True)
class Found:
    """What lies at a path: `document` is its JSON, for kinds that are JSON files."""

    path: Path
    kind: str
    document: Mapping[str, Any] | None = None


def recognise(path: Path) -> Found:
    """Tell what kind of artefact a path is; whether it is whole is not checked.

    Raises:
        InputError: It is none, and the message says what is there instead; or it cannot be read.
    """
    require_reachable(path)
    if path.is_dir():
        return Found(path, _kind_of_directory(path))
    descriptor = open_input(path)
    try:
        start, size = os.pread(descriptor, 64, 0), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    # Of a safetensors file the JSON begins after eight bytes.
    if start[8:9] == b"{" or is_lfs_pointer(start) or path.suffix == ".safetensors":
        return Found(path, _kind_of_tensors(path))
    if not _LIKE_JSON.match(start):
        what = "is empty" if not size else f"is a file of {size:,} bytes, neither safetensors nor JSON"
        raise InputError(what, where=path, fix=f"pass {_WANTED}")
    if size > _LARGEST_JSON:
        raise InputError(f"is text of {size:,} bytes, too large for a profile or architecture", where=path)
    document = read_measurements(path)
    return Found(path, _kind_of_document(document, path), document)


def with_article(kind: str) -> str:
    """A kind in a sentence: `a trace`, `an architecture`."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _kind_of_directory(path: Path) -> str:
    try:
        names = sorted(child.name for child in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot be listed ({error.strerror})", where=path) from None
    for name, kind in ((FLASH_INDEX, BUNDLED_LAYOUT), (PERMUTED_INDEX, PERMUTED_LAYOUT)):
        if name in names:
            return kind
    if {CONFIG_FILE, SINGLE_FILE, SHARD_INDEX} & set(names):
        return CHECKPOINT
    if not names:
        raise InputError("is an empty directory", where=path, fix=f"pass {_WANTED}")
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    raise InputError(
        f"is a directory with {', '.join(names[:_SHOWN])}{more}: neither a checkpoint (it has no {CONFIG_FILE}) nor a "
        f"layout (no {FLASH_INDEX})",
        where=path,
        fix="pass one of its files or folders",
    )


def _kind_of_tensors(path: Path) -> str:
    with TensorFile(path) as file:
        text = file.header.metadata.get(METADATA_KEY)
        if text is None:
            count = len(file.header.entries)
            raise InputError(
                f"is a safetensors file of {count:,} tensors that neuralink did not write",
                where=path,
                fix="if these are weights, pass the directory of their checkpoint or layout",
            )
        form = parse_object(text, path).get("format")
    kind = {"neuralink-trace": TRACE, "neuralink-placement": PLACEMENT}.get(str(form))
    if kind is None:
        raise InputError(f"is a stage file of format {form!r}, which this version does not know", where=path)
    return kind


def _kind_of_document(document: Mapping[str, Any], path: Path) -> str:
    if is_fio_output(document):
        return FIO
    if document.get("format") == "neuralink-device" or "queue_depth" in document:
        return DEVICE
    if "model_types" in document:
        return ARCHITECTURE
    for what, keys in (
        ("the index of a layout", {"layout", "document_sha256"}),
        ("the index of a checkpoint's shards", {"weight_map"}),
        ("the config of a checkpoint", {"model_type"}),
    ):
        if keys <= document.keys():
            raise InputError(f"is {what}", where=path, fix="pass the directory that it is in")
    named = ", ".join(repr(key) for key in list(document)[:_SHOWN]) or "no keys"
    raise InputError(
        f"is JSON with {named}: neither a device profile, nor the output of fio, nor an architecture",
        where=path,
        fix=f"pass {_WANTED}",
    )
