"""The modules of FFN blocks by the names of tensors. Every tensor under one must be described, or it is an error.

A tensor under the module of a block that no description mentions (a norm, a scale, a bias) may belong to its neurons.
An order that does not move it scrambles the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Template

from neuralink_cli.architectures.architecture import Architecture, BlockPattern
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.packed_tensors import shapes_of
from neuralink_cli.errors import UnsupportedError

_LAYER, _EXPERT = "${layer}", "${expert}"


@dataclass(frozen=True)
class ModuleNames:
    """The modules of transformers that compute a block, as an architecture names them.

    Attributes:
        parts: The module that holds the weight of each role.
        shares: By role, (k, n) if its weight is the k-th of n in its module, counted from 1.
        experts: The module that runs all experts of the layer, if the block is one of them.
    """

    parts: Mapping[str, str]
    shares: Mapping[str, tuple[int, int]]
    experts: str | None


def module_names(architecture: Architecture, block_id: str, weights: Mapping[str, str]) -> ModuleNames:
    """The modules of a block.

    Args:
        weights: The name of the tensor of each of its roles.

    Raises:
        UnsupportedError: The architecture has no such block.
    """
    for pattern in architecture.blocks:
        found = _matcher(pattern.id).fullmatch(block_id)
        if found is None or pattern.parts.keys() != weights.keys():
            continue
        numbers = found.groupdict()
        stated = {role: Template(part.weight).safe_substitute(numbers) for role, part in pattern.parts.items()}
        prefixes = {
            name.removesuffix(stated[role]) if name.endswith(stated[role]) else None for role, name in weights.items()
        }
        prefix = next(iter(prefixes))
        if len(prefixes) > 1 or prefix is None:
            continue

        def named(text: str, prefix: str = prefix, numbers: Mapping[str, str] = numbers) -> str:
            return prefix + Template(text).safe_substitute(numbers)

        return ModuleNames(
            {role: named(part.module or part.weight.rpartition(".")[0]) for role, part in pattern.parts.items()},
            {role: part.share for role, part in pattern.parts.items()},
            None if pattern.experts is None else named(pattern.experts.module),
        )
    raise UnsupportedError(
        f"architecture {architecture.name!r} has no block {block_id!r} of {', '.join(sorted(weights.values()))}",
        fix="pass the --architecture that the layout was made with",
    )


def module_patterns(pattern: BlockPattern) -> tuple[str, ...]:
    """The modules of a kind of block, as name patterns: what its parts share beyond the layer, else those of each part.

    Experts have two: their own, if they have tensors of their own, and that of all experts of the layer.
    """
    parts = [part.weight.split(".")[:-1] for part in pattern.parts.values()]
    shared = _shared_steps(parts)
    modules = [shared] if _beyond_layer(shared) else [steps for steps in parts if _beyond_layer(steps)]
    found: dict[str, None] = {}
    for steps in modules:
        found[".".join(steps)] = None
        if _EXPERT in steps and _beyond_layer(steps[: steps.index(_EXPERT)]):
            found[".".join(steps[: steps.index(_EXPERT)])] = None
    return tuple(found)


def require_described(
    checkpoint: Checkpoint,
    blocks: Sequence[FFNBlock],
    modules: Mapping[str, str],
    architecture: Architecture,
    prefix: str,
) -> None:
    """Check that every tensor in the modules of blocks is a part of one, or one that the architecture ignores.

    Args:
        modules: The id of a block by the name of its module.
        prefix: Of the names of all tensors that the architecture speaks of.

    Raises:
        UnsupportedError: One is neither.
    """
    named = {name for block in blocks for part in block.parts for name in (part.weight, part.bias)}
    known = {name for name in named if name is not None}
    known |= {checkpoint.scaled[name].scales for name in known & checkpoint.scaled.keys()}
    known |= shapes_of({name: checkpoint.packed[name] for name in known & checkpoint.packed.keys()})
    ignored = [_matcher(prefix + name) for name in architecture.ignored]
    for name in sorted(checkpoint.tensors.keys() - known):
        block = next((modules[module] for module in _modules_above(name) if module in modules), None)
        if block is None or any(pattern.fullmatch(name) for pattern in ignored):
            continue
        shape = list(checkpoint.place(name).entry.shape)
        raise UnsupportedError(
            f"tensor {name!r} {shape} lies in the module of block {block!r}, and architecture {architecture.name!r} "
            "does not say what it does there",
            where=checkpoint.directory,
            fix="if its neurons have no part in it, describe the architecture with this name under `ignored` "
            "(docs/architectures.md) for --architecture",
        )


def _modules_above(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _shared_steps(paths: Iterable[Sequence[str]]) -> list[str]:
    shared = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return shared


def _beyond_layer(steps: Sequence[str]) -> bool:
    """Whether steps of a name lead into a module within a layer."""
    return any(_LAYER in step for step in steps[:-1])


def _matcher(pattern: str) -> re.Pattern[str]:
    """Matches names of a pattern, with groups for the numbers of layer and expert."""
    numbered = re.escape(pattern)
    for variable in (_LAYER, _EXPERT):
        group, again = f"(?P<{variable[2:-1]}>[0-9]+)", f"(?P={variable[2:-1]})"
        numbered = numbered.replace(re.escape(variable), group, 1).replace(re.escape(variable), again)
    return re.compile(numbered)
