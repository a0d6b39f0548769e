"""What is said of a model that no built-in architecture describes: why, or which is most like it and what differs.

Names are compared without their numbers, and whatever comes before the names that a description uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template

from neuralink_cli.architectures.architecture import (
    Architecture,
    BlockPattern,
    builtin_architectures,
    find_architecture,
)
from neuralink_cli.architectures.block_modules import module_patterns
from neuralink_cli.architectures.inference_names import LAYER, NamePattern, take_numbers_out
from neuralink_cli.checkpoint.model_description import ModelDescription
from neuralink_cli.errors import UnsupportedError

# Names of each kind that are shown.
_MOST_NAMES = 2


@dataclass(frozen=True)
class _Likeness:
    """How many weights of an architecture a model has, the names of those that it lacks, and of those beside them."""

    architecture: Architecture
    found: int
    missing: tuple[str, ...]
    not_described: tuple[str, ...]

    @property
    def closeness(self) -> tuple[int, int, int]:
        """Larger is more alike: what is shared, less what differs; of equals the one that serves most model types."""
        differing = len(self.missing) + len(self.not_described)
        return (self.found - differing, -differing, len(self.architecture.model_types))


def require_known(model: ModelDescription) -> Architecture:
    """The built-in architecture of a model's type.

    Raises:
        UnsupportedError: There is none. The message says why there cannot be one, or names the nearest and how its
            tensors differ.
    """
    model_type = str(model.config.get("model_type"))
    if model_type in (known := unsupported()):
        raise UnsupportedError(f"model type {model_type!r} is not supported: {known[model_type]}", where=model.where)
    try:
        return find_architecture(model_type, model.where)
    except UnsupportedError as error:
        said = nearest(model)
        if said is None:
            raise
        raise UnsupportedError(f"{error.what}; {said}", where=error.where, fix=error.fix) from None


@cache
def unsupported() -> dict[str, str]:
    """Why model types of transformers are not supported, by type."""
    document = json.loads(resources.files(__package__).joinpath("unsupported.json").read_bytes())
    return {model_type: entry["why"] for entry in document for model_type in entry["model_types"]}


def nearest(model: ModelDescription) -> str | None:
    """What the most similar built-in architecture is, and which tensors differ; None if none has a tensor in common."""
    names: dict[NamePattern, str] = {}
    for name in model.shapes:
        taken = take_numbers_out(name)
        if taken is not None:
            names.setdefault(taken[0], name)
    likenesses = [
        _likeness(names, architecture, prefix)
        for architecture in builtin_architectures()
        for prefix in _prefixes(names, architecture)
    ]
    if not likenesses:
        return None
    best = max(likenesses, key=lambda likeness: likeness.closeness)
    differing = [
        f"{what} {_some(found)}"
        for what, found in (("missing", best.missing), ("not described:", best.not_described))
        if found
    ]
    return "; ".join([f"nearest: {best.architecture.name}", *(differing or ["none of its tensors is missing"])])


def _prefixes(names: Mapping[NamePattern, str], architecture: Architecture) -> set[str]:
    """What stands before the names of an architecture in a model."""
    found = set()
    for pattern in architecture.blocks:
        for weight in _weights(pattern, ""):
            for name in names:
                if name.rest == weight.rest and name.stack.endswith(weight.stack):
                    found.add(name.stack.removesuffix(weight.stack))
    return found


def _likeness(names: Mapping[NamePattern, str], architecture: Architecture, prefix: str) -> _Likeness:
    found: set[NamePattern] = set()
    missing: set[NamePattern] = set()
    known = {_pattern(prefix, name) for name in architecture.ignored}
    modules: list[NamePattern] = []
    # Of several ways to store a block, the one that most of is there.
    for block_id in {pattern.id for pattern in architecture.blocks}:
        ways = [pattern for pattern in architecture.blocks if pattern.id == block_id]
        way = max(ways, key=lambda way: len(names.keys() & _weights(way, prefix)))
        weights = set(_weights(way, prefix))
        if there := weights & names.keys():
            found |= there
            missing |= weights - there
            known |= weights | {_pattern(prefix, part.bias) for part in way.parts.values() if part.bias is not None}
            modules += [_pattern(prefix, f"{module}.") for module in module_patterns(way)]
    beside = {
        name
        for name in names.keys() - known
        if any(name.stack == module.stack and name.rest.startswith(module.rest) for module in modules)
    }
    layer = min(_layer(names[pattern]) for pattern in found)
    lacking = sorted(Template(str(pattern)).substitute(layer=layer, expert=0) for pattern in missing)
    return _Likeness(architecture, len(found), tuple(lacking), tuple(sorted(names[name] for name in beside)))


def _weights(pattern: BlockPattern, prefix: str) -> frozenset[NamePattern]:
    return frozenset(_pattern(prefix, part.weight) for part in pattern.parts.values())


def _pattern(prefix: str, name: str) -> NamePattern:
    """A name of a description, taken apart as names of tensors are."""
    stack, _, rest = name.partition(f"{LAYER}.")
    return NamePattern(prefix + stack, rest)


def _layer(name: str) -> int:
    taken = take_numbers_out(name)
    assert taken is not None
    return taken[1].layer


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
