"""JSON Schemas: each room keeps the schemas of its own documents; this module checks documents against them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import parse_object


@dataclass(frozen=True)
class Schema:
    """The JSON Schema of one kind of document.

    Attributes:
        kind: The name of such a document in error messages: "trace", "flash index".
        package: The package that contains the schema, usually `__package__` of the calling module.
        file: The schema's file in that package.
    """

    kind: str
    package: str
    file: str

    def read(self) -> dict[str, Any]:
        """The schema itself."""
        return parse_object(resources.files(self.package).joinpath(self.file).read_bytes(), self.file)


def check_document(document: dict[str, Any], schema: Schema, where: str | os.PathLike[str]) -> None:
    """Check a document against its schema.

    Raises:
        InputError: The document is not valid. The message says where and why.
    """
    from jsonschema.exceptions import best_match

    try:
        error = best_match(_validator(schema).iter_errors(document))
    except RecursionError:
        raise InputError(f"not a valid {schema.kind}: nested too deeply", where=where) from None
    if error is not None:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
        complaint = error.message if len(error.message) <= 200 else error.message[:200] + "..."
        raise InputError(f"not a valid {schema.kind}: at {place.lstrip('.') or 'the top'}: {complaint}", where=where)


# Beyond it JSON readers that use floating point lose integers, and 64-bit sums overflow.
_LARGEST_INTEGER = (1 << 53) - 1


@cache
def _validator(schema: Schema) -> Any:
    """A validator that takes 24.0 for no integer, true for no number, and a pattern's $ for the end of the text."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
    keywords = {"pattern": _check_pattern, "const": _check_const, "enum": _check_enum}
    return extend(Draft202012Validator, keywords, type_checker=types)(schema.read())


def _is_integer(_checker: Any, value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST_INTEGER


def _is_number(checker: Any, value: Any) -> bool:
    return type(value) is float or _is_integer(checker, value)


def _check_pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    # Python's own $ also matches before a line break at the end.
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _check_const(_validator: Any, expected: Any, value: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if type(value) is not type(expected) or value != expected:
        yield ValidationError(f"{expected!r} was expected")


def _check_enum(_validator: Any, allowed: Any, value: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not any(type(value) is type(one) and value == one for one in allowed):
        yield ValidationError(f"{value!r} is not one of {allowed!r}")
