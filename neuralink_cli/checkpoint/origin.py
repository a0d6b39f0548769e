"""Where a checkpoint came from: a note for people. Its fingerprint identifies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A model on the Hugging Face hub, as `org/name` or `name`, and the commit of its files."""

    id: str
    revision: str


def parse_origin(document: Mapping[str, str] | None) -> Origin | None:
    """An origin from a checked document; None for a local directory."""
    return None if document is None else Origin(**document)
