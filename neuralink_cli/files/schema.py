"""JSON Schemas: each room keeps the schemas of its own documents; this module checks documents against them."""

from __future__ import annotations

import os
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

    error = best_match(_validator(schema).iter_errors(document))
    if error is not None:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
        complaint = error.message if len(error.message) <= 200 else error.message[:200] + "..."
        raise InputError(f"not a valid {schema.kind}: at {place.lstrip('.') or 'the top'}: {complaint}", where=where)


@cache
def _validator(schema: Schema) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema.read())
