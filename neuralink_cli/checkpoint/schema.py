"""Checks documents against the JSON Schemas that are published with the package."""

from __future__ import annotations

import os
from functools import cache
from importlib import resources
from typing import Any

from neuralink_cli.checkpoint.json_text import parse_object
from neuralink_cli.errors import InputError

SCHEMAS = {
    "architecture": "checkpoint/architectures/architecture.schema.json",
    "trace": "activations/trace.schema.json",
    "placement": "placement/placement.schema.json",
    "device": "placement/devices/device.schema.json",
    "flash index": "flash/flash_index.schema.json",
    "permuted index": "flash/permuted_index.schema.json",
}


def load_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of one kind of document (a key of `SCHEMAS`)."""
    source = resources.files("neuralink_cli").joinpath(SCHEMAS[kind])
    return parse_object(source.read_bytes(), SCHEMAS[kind])


def check_document(document: dict[str, Any], kind: str, where: str | os.PathLike[str]) -> None:
    """Check a document against the schema of its kind.

    Raises:
        InputError: With the place in the document and what is wrong there.
    """
    from jsonschema.exceptions import best_match

    error = best_match(_validator(kind).iter_errors(document))
    if error is not None:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
        complaint = error.message if len(error.message) <= 200 else error.message[:200] + "..."
        raise InputError(f"not a valid {kind}: at {place.lstrip('.') or 'the top'}: {complaint}", where=where)


@cache
def _validator(kind: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(load_schema(kind))
