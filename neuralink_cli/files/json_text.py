"""JSON in and out, strictly: no duplicate keys, NaN or lone surrogates in; one canonical form on the way out."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import read_input

# No integer that means anything here has more; thousands of them would take their time.
_MOST_DIGITS = 40


def parse_object(text: bytes | str, where: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InputError: Not UTF-8, not JSON, not an object, a duplicate key, half of a surrogate pair, or a number that is
            not finite.
    """
    try:
        # Decoded here, because json guesses between the encodings of Unicode.
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
        raise InputError(f"not valid JSON ({error})", where=where) from None
    if not isinstance(document, dict):
        raise InputError("not a JSON object", where=where)
    return document


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        InputError: The file cannot be read, or as `parse_object`.
    """
    return parse_object(read_input(path), path)


def canonical(document: Any) -> str:
    """The one compact spelling of a document: sorted keys, no spaces, ASCII."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def readable(document: Any) -> str:
    """The spelling for files that people open: indented, keys in the order given, ending in a newline."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


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
    # As everywhere but in Python: minus zero is no integer.
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
