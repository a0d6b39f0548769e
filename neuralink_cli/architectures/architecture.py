"""Architectures are JSON files: each describes which tensors of a model type make up its FFN blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError, UnsupportedError, advising
from neuralink_cli.files.json_text import parse_object, read_object
from neuralink_cli.files.schema import Schema, check_document

ARCHITECTURE_SCHEMA = Schema("architecture", __package__, "architecture.schema.json")
_FOLDER = "descriptions"
# In bundle order.
_ROLES = ("gate", "up", "down")
_EXPERT = "${expert}"


@dataclass(frozen=True)
class WeightPattern:
    """A weight of a block: its name pattern, the axis along which its neurons run, and the name of an optional bias.

    Attributes:
        share: (k, n) if the weight is the k-th of n weights stored one after the other in one tensor, counted from 1.
        alternating: Whether these n weights have a neuron each in turn instead.
        module: The module that holds the weight in transformers, if its name differs from the tensor's.
    """

    weight: str
    neuron_axis: int
    bias: str | None = None
    share: tuple[int, int] = (1, 1)
    alternating: bool = False
    module: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return _EXPERT in self.weight


@dataclass(frozen=True)
class ExpertsPattern:
    """MoE experts: blocks that run only on the tokens routed to them.

    Attributes:
        count_keys, per_token_keys: Config keys for the number of experts, and for the experts per token.
        module: The module that runs the experts.
    """

    count_keys: tuple[str, ...]
    per_token_keys: tuple[str, ...]
    module: str


@dataclass(frozen=True)
class BlockPattern:
    """One kind of FFN block: its id, its weights by role in bundle order (gate, up, down), and where it occurs."""

    id: str
    parts: Mapping[str, WeightPattern]
    layer_keys: tuple[str, ...]
    experts: ExpertsPattern | None = None


@dataclass(frozen=True)
class ConfigNumber:
    """A number that a config states under one of some keys, or else `default`; None if there is none then."""

    keys: tuple[str, ...]
    default: float | None


@dataclass(frozen=True)
class UpPattern:
    """What becomes of values of up before they are multiplied: clamped to -limit and limit, then `plus` is added."""

    limit: ConfigNumber | None
    plus: float


@dataclass(frozen=True)
class Architecture:
    """A parsed `descriptions/*.json`; see `architecture.schema.json` for the meaning of each field.

    Attributes:
        runs_as: A model type of transformers that computes the same, for checkpoints that come with their own code.
        up_activation: Whether the up projection is activated too, which the `runs_as` model does not do.
        ignored: Name patterns of tensors in the modules of blocks that have nothing to do with their neurons.
        layers_without_blocks: Whether layers may have none of the blocks.
        cut_keys: Config keys for the share of neurons that each layer cuts off, see `activation_names`.
        slope: Of an activation x * sigmoid(slope * x), in place of a name.
        at_most: What the gate is clamped to from above before the activation.
    """

    name: str
    model_types: tuple[str, ...]
    task: str
    prefixes: tuple[str, ...]
    activation_keys: tuple[str, ...]
    activation_default: str | None
    not_in_checkpoint: tuple[str, ...]
    blocks: tuple[BlockPattern, ...]
    activation_names: Mapping[str, str] = field(default_factory=dict)
    runs_as: str | None = None
    up_activation: bool = False
    ignored: tuple[str, ...] = ()
    layers_without_blocks: bool = False
    cut_keys: tuple[str, ...] = ()
    slope: ConfigNumber | None = None
    at_most: ConfigNumber | None = None
    up_values: UpPattern | None = None

    def bare_name(self, name: str) -> str:
        """The name of a tensor or module without its prefix: the first in `prefixes` that it starts with."""
        return next((name[len(prefix) :] for prefix in self.prefixes if prefix and name.startswith(prefix)), name)


def parse_architecture(document: dict[str, Any], where: str | Path) -> Architecture:
    """Check an architecture document and turn it into an `Architecture`.

    Raises:
        InputError: It does not match the schema (unknown keys included), or uses a tensor twice.
    """
    check_document(document, ARCHITECTURE_SCHEMA, where)
    layer_keys = tuple(document.get("layers", ()))
    blocks = tuple(_parse_block(block, layer_keys, where) for block in document["blocks"])
    _require_distinct(blocks, where)
    activation, runs_as = document["activation"], document.get("runs_as", {})
    return Architecture(
        name=document["name"],
        model_types=tuple(document["model_types"]),
        task=document["task"],
        prefixes=tuple(document["prefixes"]),
        activation_keys=tuple(activation.get("config", ())),
        activation_default=activation.get("default"),
        not_in_checkpoint=tuple(document.get("not_in_checkpoint", ())),
        blocks=blocks,
        activation_names=activation.get("names", {}),
        runs_as=runs_as.get("model_type"),
        up_activation=runs_as.get("up_activation", False),
        ignored=tuple(document.get("ignored", ())),
        layers_without_blocks=document.get("layers_without_blocks", False),
        cut_keys=tuple(activation.get("cut", ())),
        slope=_parse_number(activation.get("slope")),
        at_most=_parse_number(activation.get("at_most")),
        up_values=_parse_up_values(document, where),
    )


def read_architecture(path: Path) -> Architecture:
    """Read an architecture from a user's file.

    Raises:
        InputError: The file cannot be read or does not match the schema.
    """
    with advising("write it as docs/architectures.md says, or let `neuralink architectures --infer MODEL` begin it"):
        return parse_architecture(read_object(path), path)


def is_built_in(model_type: str) -> bool:
    """Whether there is a built-in architecture for a `model_type`."""
    return model_type in _documents_by_model_type()


def find_architecture(model_type: str, where: Path) -> Architecture:
    """The built-in architecture for a `model_type`.

    Raises:
        UnsupportedError: There is none.
    """
    if not is_built_in(model_type):
        raise UnsupportedError(
            f"architecture {model_type!r} is not known (`neuralink architectures` lists the known ones)",
            where=where,
            fix="try --infer-architecture, or describe it in a JSON file (docs/architectures.md) for --architecture",
        )
    name, document = _documents_by_model_type()[model_type]
    return parse_architecture(document, name)


def builtin_architectures() -> list[Architecture]:
    """All architectures that come with the package, by name."""
    documents = dict(_documents_by_model_type().values())
    return [parse_architecture(document, name) for name, document in sorted(documents.items())]


def _parse_block(document: Mapping[str, Any], layer_keys: tuple[str, ...], where: str | Path) -> BlockPattern:
    experts = document.get("experts")
    if (experts is not None) != (_EXPERT in document["id"]):
        raise InputError(
            f"block {document['id']!r} needs both `experts` and {_EXPERT} in its id, or neither", where=where
        )
    parts = {role: _parse_part(document[role]) for role in _ROLES if role in document}
    for part in parts.values():
        if experts is None and _EXPERT in part.weight + (part.bias or ""):
            raise InputError(
                f"tensor {part.weight!r} has {_EXPERT}, but its block {document['id']!r} has not", where=where
            )
        if part.share[0] > part.share[1]:
            raise InputError(f"tensor {part.weight!r} cannot be part {part.share[0]} of {part.share[1]}", where=where)
        if part.alternating and experts is None:
            raise InputError(f"tensor {part.weight!r} has alternating parts, which only experts may have", where=where)
    return BlockPattern(
        id=document["id"],
        parts=parts,
        layer_keys=tuple(document.get("layers", layer_keys)),
        experts=None if experts is None else _parse_experts(experts),
    )


def _parse_number(document: Mapping[str, Any] | None) -> ConfigNumber | None:
    return None if document is None else ConfigNumber(tuple(document.get("config", ())), document.get("default"))


def _parse_up_values(document: Mapping[str, Any], where: str | Path) -> UpPattern | None:
    stated = document.get("up_values")
    if stated is None:
        return None
    without = next((block["id"] for block in document["blocks"] if "gate" not in block), None)
    if without is not None or document.get("runs_as", {}).get("up_activation"):
        what = "an activated up projection" if without is None else f"block {without!r} without a gate"
        raise InputError(f"describes `up_values` and {what}, which do not go together", where=where)
    return UpPattern(_parse_number(stated.get("limit")), stated.get("plus", 0))


def _parse_experts(document: Mapping[str, Any]) -> ExpertsPattern:
    count, per_token = (tuple(document.get(key, ())) for key in ("count", "per_token"))
    return ExpertsPattern(count, per_token, document["module"])


def _parse_part(document: Mapping[str, Any]) -> WeightPattern:
    share = document.get("share", {"part": 1, "of": 1})
    alternating = share.get("alternating", False)
    return WeightPattern(**{**document, "share": (share["part"], share["of"]), "alternating": alternating})


def _require_distinct(blocks: tuple[BlockPattern, ...], where: str | Path) -> None:
    """Check that every tensor, or share, belongs to one part of one block. A block may be stored in several ways."""
    owners: dict[tuple[str, tuple[int, int]], str] = {}
    for block in blocks:
        for name, share in (found := list(_tensors(block))):
            if owners.setdefault((name, share), block.id) != block.id or found.count((name, share)) > 1:
                raise InputError(f"describes tensor {name!r} twice", where=where)
    ways = [(block.id, block.parts["up"].weight) for block in blocks]
    if len(set(ways)) < len(ways):
        twice = next(way for way in ways if ways.count(way) > 1)
        raise InputError(f"describes block {twice[0]!r} twice", where=where)


def _tensors(block: BlockPattern) -> Iterator[tuple[str, tuple[int, int]]]:
    for part in block.parts.values():
        yield part.weight, part.share
        if part.bias is not None:
            yield part.bias, part.share


@cache
def _documents_by_model_type() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    folder = resources.files(__package__).joinpath(_FOLDER)
    for source in sorted(folder.iterdir(), key=lambda item: item.name):
        if not source.name.endswith(".json"):
            continue
        document = parse_object(source.read_bytes(), source.name)
        for model_type in document.get("model_types", ()):
            if model_type in found:
                raise InputError(f"model type {model_type!r} is also in {found[model_type][0]}", where=source.name)
            found[model_type] = (source.name, document)
    return found
