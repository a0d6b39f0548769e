"""Compares the files beside the weights of a layout with its index and with those of the checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.companions import find_companions, left_out_files
from neuralink_cli.checkpoint.file_names import CONFIG_FILE, SHARD_INDEX
from neuralink_cli.errors import VerificationError, shorten
from neuralink_cli.files.input_file import digest_of
from neuralink_cli.layout.companions import require_companions, source_name, stored_name, was_changed
from neuralink_cli.layout.open_layout import Layout

# Larger files are, like weights, not read by a quick check.
QUICK_BYTES = 1 << 24
# Of a value in a message, this many characters are shown.
_SHOWN = 60


@dataclass(frozen=True)
class Held:
    """A file of the source as a layout holds it."""

    nbytes: int
    sha256: str


def held_files(layout: Layout) -> dict[str, Held]:
    """The files of the source that a layout holds, without the weights and their index, by their name in the source."""
    held = {name: Held(len(data), hashlib.sha256(data).hexdigest()) for name, data in layout.verbatim.items()}
    held.update({source_name(file["name"]): Held(file["bytes"], file["sha256"]) for file in layout.companions})
    if SHARD_INDEX in layout.verbatim:
        # How the weights are cut into shards says nothing about the model.
        del held[SHARD_INDEX]
    return held


def large_bytes(layout: Layout) -> int:
    """Bytes of the layout's files beside the weights that `check_large_companions` reads."""
    return sum(file["bytes"] for file in layout.companions if file["bytes"] > QUICK_BYTES)


def check_companions(layout: Layout, checkpoint: Checkpoint) -> None:
    """Compare names and sizes of all files beside the weights, and the content of those that are not large.

    Raises:
        VerificationError: A file is missing or differs: from the index, or from the checkpoint.
        InputError: A file cannot be read.
    """
    require_companions(layout)
    _check_digests(layout, large=False)
    held = held_files(layout)
    _compare_names(held, layout, checkpoint)
    _compare_content(held, layout, checkpoint, large=False)


def check_large_companions(
    layout: Layout, checkpoint: Checkpoint, progress: Callable[[int], object] | None = None
) -> None:
    """Compare the content that `check_companions` leaves to this.

    Args:
        progress: Called with the layout's bytes read since the last call.

    Raises:
        VerificationError, InputError: As `check_companions`.
    """
    _check_digests(layout, large=True, progress=progress)
    if large_bytes(layout):
        _compare_content(held_files(layout), layout, checkpoint, large=True)


def _check_digests(layout: Layout, *, large: bool, progress: Callable[[int], object] | None = None) -> None:
    for file in layout.companions:
        path = layout.directory / file["name"]
        if (file["bytes"] > QUICK_BYTES) == large and digest_of(path, progress) != file["sha256"]:
            raise was_changed(path)


def _compare_names(held: Mapping[str, Held], layout: Layout, checkpoint: Checkpoint) -> None:
    weights = checkpoint.weight_names
    there = find_companions(checkpoint.directory, weights)
    for file in there.companions:
        if file.name not in held:
            raise VerificationError(
                f"has no {file.name}, which is in {checkpoint.directory}",
                where=layout.directory,
                fix="if it was not added since, run `relayout` again",
            )
    # What is left out by default may be in the layout alone: nobody fetches it for a comparison.
    optional = left_out_files([*held, *weights], weights)
    names = {file.name for file in (*there.companions, *there.left_out)}
    for name in held:
        if name not in names and name not in optional:
            raise VerificationError(f"holds {name}, which is not in {checkpoint.directory}", where=layout.directory)


def _compare_content(held_by: Mapping[str, Held], layout: Layout, checkpoint: Checkpoint, *, large: bool) -> None:
    # The config first: most of what is wrong elsewhere follows from it.
    for name, held in sorted(held_by.items(), key=lambda item: (item[0] != CONFIG_FILE, item[0])):
        path = checkpoint.directory / name
        if (held.nbytes > QUICK_BYTES) != large or not path.is_file():
            continue
        if path.stat().st_size != held.nbytes or digest_of(path) != held.sha256:
            detail = _first_difference(layout.directory / stored_name(name), path)
            raise VerificationError(
                f"{name} differs from that in {checkpoint.directory}{detail}", where=layout.directory
            )


def _first_difference(ours: Path, theirs: Path) -> str:
    """Which value of two JSON files differs, for a message; empty if they are not JSON."""
    if ours.suffix != ".json" or max(ours.stat().st_size, theirs.stat().st_size) > QUICK_BYTES:
        return ""
    try:
        way, values = _differing_value(json.loads(ours.read_bytes()), json.loads(theirs.read_bytes()))
    except (ValueError, RecursionError):
        return ""
    shown = [shorten(value, _SHOWN) for value in values]
    return f": {way} is {shown[0]} in the layout, {shown[1]} in the checkpoint" if way else ""


def _differing_value(ours: Any, theirs: Any) -> tuple[str, tuple[str, str]]:
    """The way to the first value that differs, and both as text."""
    way: list[str] = []
    while isinstance(ours, dict) and isinstance(theirs, dict):
        key = next((key for key in {**ours, **theirs} if _text(ours, key) != _text(theirs, key)), None)
        if key is None:
            break
        way.append(key)
        if key not in ours or key not in theirs:
            return ".".join(way), (_text(ours, key), _text(theirs, key))
        ours, theirs = ours[key], theirs[key]
    return ".".join(way), (json.dumps(ours), json.dumps(theirs))


def _text(document: dict[str, Any], key: str) -> str:
    # As text, NaN is equal to itself and 1 is not 1.0.
    return json.dumps(document[key]) if key in document else "absent"
