"""Where a checkpoint came from: a note for people. What identifies a checkpoint is its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A model on the Hugging Face hub, as `org/name` or `name`, and the commit whose files these are."""

    id: str
    revision: str


def parse_origin(document: Mapping[str, str] | None) -> Origin | None:
    """An origin from a checked document; None is a local directory."""
    return None if document is None else Origin(**document)
