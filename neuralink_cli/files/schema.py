"""JSON Schemas: each room keeps the schemas of its own documents; this module checks documents against them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import parse_object
from neuralink_cli.files.schema_check import Check, compile_schema, is_integer, is_number, is_the_same, whole_pattern


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
    try:
        error = None if _check(schema)(document) else _first_error(document, schema)
    except RecursionError:
        raise InputError(f"not a valid {schema.kind}: nested too deeply", where=where) from None
    if error is not None:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
        complaint = error.message if len(error.message) <= 200 else error.message[:200] + "..."
        raise InputError(f"not a valid {schema.kind}: at {place.lstrip('.') or 'the top'}: {complaint}", where=where)


def _first_error(document: dict[str, Any], schema: Schema) -> Any:
    from jsonschema.exceptions import best_match

    return best_match(_validator(schema).iter_errors(document))


@cache
def _check(schema: Schema) -> Check:
    return compile_schema(schema.read())


@cache
def _validator(schema: Schema) -> Any:
    """A validator that takes 24.0 for no integer, true for no number, and a pattern's $ for the end of the text."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
    keywords = {"pattern": _check_pattern, "const": _check_const, "enum": _check_enum}
    return extend(Draft202012Validator, keywords, type_checker=types)(schema.read())


def _is_integer(_checker: Any, value: Any) -> bool:
    return is_integer(value)


def _is_number(_checker: Any, value: Any) -> bool:
    return is_number(value)


def _check_pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and not whole_pattern(pattern).search(value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _check_const(_validator: Any, expected: Any, value: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not is_the_same(value, expected):
        yield ValidationError(f"{expected!r} was expected")


def _check_enum(_validator: Any, allowed: Any, value: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not any(is_the_same(value, one) for one in allowed):
        yield ValidationError(f"{value!r} is not one of {allowed!r}")
