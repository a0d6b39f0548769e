"""Architectures are data: one JSON file each says which tensors of a model type make up its FFN blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.json_text import parse_object, read_object
from neuralink_cli.checkpoint.schema import check_document
from neuralink_cli.errors import InputError, UnsupportedError

_FOLDER = "checkpoint/architectures"
# In bundle order.
_ROLES = ("gate", "up", "down")


@dataclass(frozen=True)
class WeightPattern:
    """A weight of a block as a name pattern, the axis along which its neurons run, and its bias if it may have one."""

    weight: str
    neuron_axis: int
    bias: str | None = None


@dataclass(frozen=True)
class BlockPattern:
    """One kind of FFN block: its id and its weights by role, in bundle order (gate, up, down)."""

    id: str
    parts: Mapping[str, WeightPattern]


@dataclass(frozen=True)
class Architecture:
    """What `architectures/*.json` says; see `architecture.schema.json` for the meaning of each field."""

    name: str
    model_types: tuple[str, ...]
    task: str
    prefixes: tuple[str, ...]
    layer_keys: tuple[str, ...]
    activation_keys: tuple[str, ...]
    activation_default: str | None
    not_in_checkpoint: tuple[str, ...]
    blocks: tuple[BlockPattern, ...]


def parse_architecture(document: dict[str, Any], where: str | Path) -> Architecture:
    """Check an architecture document and turn it into an `Architecture`.

    Raises:
        InputError: It does not meet the schema (unknown keys included), or uses an id or a tensor twice.
    """
    check_document(document, "architecture", where)
    _require_distinct(document["blocks"], where)
    blocks = []
    for block in document["blocks"]:
        parts = {role: WeightPattern(**block[role]) for role in _ROLES if role in block}
        blocks.append(BlockPattern(block["id"], parts))
    return Architecture(
        name=document["name"],
        model_types=tuple(document["model_types"]),
        task=document["task"],
        prefixes=tuple(document["prefixes"]),
        layer_keys=tuple(document.get("layers", ())),
        activation_keys=tuple(document["activation"].get("config", ())),
        activation_default=document["activation"].get("default"),
        not_in_checkpoint=tuple(document.get("not_in_checkpoint", ())),
        blocks=tuple(blocks),
    )


def read_architecture(path: Path) -> Architecture:
    """An architecture from a user's file.

    Raises:
        InputError: It cannot be read or does not meet the schema.
    """
    return parse_architecture(read_object(path), path)


def find_architecture(model_type: str, where: Path) -> Architecture:
    """The built-in architecture for a `model_type`.

    Raises:
        UnsupportedError: None is known; the message lists those that are.
    """
    by_type = _documents_by_model_type()
    if model_type not in by_type:
        raise UnsupportedError(
            f"architecture {model_type!r} is not known (known: {', '.join(sorted(by_type))})",
            where=where,
            fix="describe it in a JSON file (docs/architectures.md) and pass --architecture FILE",
        )
    name, document = by_type[model_type]
    return parse_architecture(document, name)


def choose_architecture(model_type: str, where: Path, override: Path | None) -> Architecture:
    """The user's architecture file if there is one, else the built-in architecture for a `model_type`.

    Raises:
        InputError, UnsupportedError: As `read_architecture` and `find_architecture`.
    """
    return find_architecture(model_type, where) if override is None else read_architecture(override)


def builtin_architectures() -> list[Architecture]:
    """All architectures that come with the package, by name."""
    documents = dict(_documents_by_model_type().values())
    return [parse_architecture(document, name) for name, document in sorted(documents.items())]


def _require_distinct(blocks: Sequence[Mapping[str, Any]], where: str | Path) -> None:
    parts = [block[role] for block in blocks for role in _ROLES if role in block]
    names = [part[key] for part in parts for key in ("weight", "bias") if key in part]
    for kind, used in (("block", [block["id"] for block in blocks]), ("tensor", names)):
        if len(set(used)) < len(used):
            twice = next(name for name in used if used.count(name) > 1)
            raise InputError(f"{kind} {twice!r} is in it twice", where=where)


@cache
def _documents_by_model_type() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    folder = resources.files("neuralink_cli").joinpath(_FOLDER)
    for source in sorted(folder.iterdir(), key=lambda item: item.name):
        if not source.name.endswith(".json") or source.name.endswith(".schema.json"):
            continue
        document = parse_object(source.read_bytes(), source.name)
        for model_type in document.get("model_types", ()):
            if model_type in found:
                raise InputError(f"model type {model_type!r} is also in {found[model_type][0]}", where=source.name)
            found[model_type] = (source.name, document)
    return found
