"""Strict JSON: reading refuses duplicate keys, NaN and lone surrogates; writing has one canonical form."""

from __future__ import annotations

import codecs
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import read_input
from neuralink_cli.files.lfs import is_lfs_pointer, refuse_lfs_pointer

# No integer that means anything here has more; thousands of them would take their time.
_MOST_DIGITS = 40
# Pieces of a text that are joined at a time.
_PIECES = 4096


def parse_object(text: bytes | str, where: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InputError: Not UTF-8, not JSON, not an object, a duplicate key, half of a surrogate pair, or a number that is
            not finite.
    """
    try:
        # Decoded here, because json would guess the Unicode encoding.
        text = text.decode() if isinstance(text, bytes) else text
        document = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({why_malformed(error)})", where=where) from None
    if not isinstance(document, dict):
        raise InputError("not a JSON object", where=where)
    return document


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        InputError: The file cannot be read, or as `parse_object`.
    """
    return parse_object(read_input(path), path)


def read_foreign_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of others that holds one object, as leniently as Python's own reader, which transformers uses.

    `Infinity` and `NaN` are numbers, and of a key that is there twice the last one counts.

    Raises:
        InputError: The file cannot be read, is a Git LFS pointer, not UTF-8, not JSON, or not an object.
    """
    text = read_input(path)
    if is_lfs_pointer(text):
        refuse_lfs_pointer(path)
    try:
        document = json.loads(_decode(text, path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({why_malformed(error)})", where=path) from None
    if not isinstance(document, dict):
        raise InputError("not a JSON object", where=path)
    return document


def why_malformed(error: ValueError | RecursionError) -> str:
    """Why bytes could not be decoded or parsed, for people."""
    return f"not UTF-8 text, at byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else str(error)


def _decode(text: bytes, path: Path) -> str:
    fix = "save it as UTF-8 without a byte order mark: other programs cannot read it either"
    if text.startswith(codecs.BOM_UTF8):
        raise InputError("starts with a byte order mark", where=path, fix=fix)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start:,} is no part of any)", where=path, fix=fix) from None


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are, by name: what JSON says of it, without a copy of all that is in it.

    Raises:
        TypeError: It is no dataclass.
    """
    return {field.name: getattr(record, field.name) for field in fields(record)}


def canonical(document: Any, as_json: Callable[[Any], Any] = fields_of) -> str:
    """The canonical text of a document: sorted keys, no spaces, ASCII.

    Args:
        as_json: Called with what JSON has no form for, such as dataclasses, for what stands for it.
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False, default=as_json)


def readable(document: Any, as_json: Callable[[Any], Any] = fields_of) -> str:
    """The text of a document for people: indented, keys in the given order, ending in a newline.

    Pieces are joined as they come: `json.dumps` keeps one for every bracket and comma until the end, which for
    thousands of blocks takes several times the memory of the text.

    Args:
        as_json: As for `canonical`.
    """
    pieces = json.JSONEncoder(indent=2, allow_nan=False, default=as_json).iterencode(document)
    stretches = iter(lambda: "".join(itertools.islice(pieces, _PIECES)), "")
    return "".join([*stretches, "\n"])


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice!r}")
    return document


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is out of range")
    return number


def _integer(text: str) -> int | float:
    # Minus zero is not an integer. Other JSON readers agree; only Python's would drop the sign.
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
