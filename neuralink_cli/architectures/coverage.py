"""How much of a model's FFN weights its blocks cover: what is shaped like an FFN and is in no block gets no order."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.inference_config import layer_count
from neuralink_cli.architectures.inference_names import NamePattern, Place, role_of, take_numbers_out
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import TensorEntry

logger = logging.getLogger(__name__)

# Modules that are an FFN whatever their weights are called.
_FFN = re.compile(r"mlp|ffn|feed_?forward|densereludense|moe|expert|^ff$", re.IGNORECASE)
# Lists of layers beside those of the text model, which are left as they are on purpose.
_ASIDE = re.compile(
    r"vision|visual|image|audio|speech|video|mtp|nextn|draft|eagle|medusa|talker|2wav|q_?former|resampler|perceiver"
    r"|projector|connector|merger",
    re.IGNORECASE,
)
_INTO, _OUT = frozenset({"gate", "up", "gate_up", "w1", "w3"}), frozenset({"down", "w2"})

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """How many bytes of FFN matrices there are, and how many of them are in blocks.

    Attributes:
        left_alone: Lists of layers whose FFNs are left as they are on purpose: vision towers, layers that only predict
            further tokens.
    """

    ffn_bytes: int
    covered_bytes: int
    left_alone: tuple[str, ...]

    def __str__(self) -> str:
        return coverage_text(self.covered_bytes, self.ffn_bytes)


def coverage_text(covered_bytes: int, ffn_bytes: int) -> str:
    """A sentence of a summary."""
    # Never rounded up to all of it.
    tenths = covered_bytes * 1000 // ffn_bytes
    return f"the blocks cover {tenths / 10:g} % of the FFN bytes"


@dataclass
class _Unit:
    """The matrices of a module that may be an FFN, by name: their shapes, and their roles if names tell them."""

    pattern: NamePattern
    place: Place
    shapes: dict[str, Shape] = field(default_factory=dict)
    roles: dict[str, str | None] = field(default_factory=dict)

    def matrices(self, hidden: frozenset[int] | None, axes: frozenset[int]) -> set[str]:
        """Those that make an FFN together: one leads from the hidden size to neurons, another one back.

        Args:
            hidden: The sizes that it may have there; None for any.
            axes: Along which neurons may run in matrices on the way there.
        """
        found = set()
        for into, role in self.roles.items():
            for out, other in self.roles.items():
                told = role in _INTO and other in _OUT
                if into != out and (told or (role is None and other is None)):
                    # Stacks of matrices are turned around by some.
                    both = len(self.shapes[into]) == 3
                    sizes = _sizes(self.shapes[into], self.shapes[out], frozenset((0, 1)) if both else axes)
                    if any((told or n != h) and (hidden is None or h in hidden) for n, h in sizes):
                        found |= {into, out}
        return found


def require_coverage(checkpoint: Checkpoint, blocks: Sequence[FFNBlock], *, allow_uncovered: bool = False) -> Coverage:
    """Check that blocks cover all FFNs of a checkpoint, but for the parts that are left alone, which are logged.

    Args:
        allow_uncovered: Only log what is not covered.

    Raises:
        UnsupportedError: They do not.
    """
    entries = {name: place.entry for name, place in checkpoint.tensors.items()}
    found = find_uncovered(
        entries,
        covered={part.weight for block in blocks for part in block.parts},
        hidden=frozenset(block.hidden for block in blocks),
        axes=frozenset(part.neuron_axis for block in blocks for part in block.parts if part.role != "down"),
        config=checkpoint.config,
    )
    if found.uncovered:
        _tell(checkpoint, found.uncovered, found.coverage, allow_uncovered)
    if found.aside:
        size = sum(found.aside.values())
        logger.warning(
            "left as they are, since they are not part of the text model: %s (%s bytes of FFNs)",
            _list(found.aside),
            f"{size:,}",
        )
    return found.coverage


@dataclass(frozen=True)
class Uncovered:
    """What blocks leave of the FFNs.

    Attributes:
        uncovered: Shapes of matrices that are in no block, by name.
        aside: Bytes of those that are left alone, by the list of layers or the layer.
    """

    coverage: Coverage
    uncovered: Mapping[str, Shape]
    aside: Mapping[str, int]


def find_uncovered(
    entries: Mapping[str, TensorEntry],
    covered: Set[str],
    hidden: frozenset[int],
    axes: frozenset[int],
    config: Mapping[str, Any],
) -> Uncovered:
    """Find the matrices of FFNs that are in no block.

    Args:
        entries: All tensors of the checkpoint.
        covered: Names of those that hold weights of blocks.
        hidden: The hidden sizes of blocks.
        axes: Along which neurons run in the matrices of gate and up.
        config: Of the checkpoint, which says how many layers the model has.
    """
    last = _last_layers(covered, config)
    uncovered: dict[str, Shape] = {}
    aside: dict[str, int] = {}
    for unit in _units(entries, covered).values():
        stack = unit.pattern.stack
        beyond = stack in last and unit.place.layer > last[stack]
        is_aside = beyond or (stack not in last and _ASIDE.search(stack) is not None)
        for name in unit.matrices(None if is_aside or stack not in last else hidden, axes):
            if is_aside:
                place = f"{stack}{unit.place.layer}" if beyond else stack.rstrip(".")
                aside[place] = aside.get(place, 0) + entries[name].nbytes
            else:
                uncovered[name] = unit.shapes[name]
    in_blocks = sum(entries[name].nbytes for name in covered)
    others = sum(entries[name].nbytes for name in uncovered)
    coverage = Coverage(in_blocks + others + sum(aside.values()), in_blocks, tuple(sorted(aside)))
    return Uncovered(coverage, uncovered, aside)


def _tell(checkpoint: Checkpoint, uncovered: Mapping[str, Shape], coverage: Coverage, allowed: bool) -> None:
    first = min(uncovered)
    what = (
        f"{len(uncovered):,} tensors shaped like FFN matrices are in no block, {first!r} {list(uncovered[first])} "
        f"among them; {coverage}"
    )
    if not allowed:
        raise UnsupportedError(
            what,
            where=checkpoint.directory,
            fix="describe them in a JSON file (docs/architectures.md) for --architecture, or pass --allow-uncovered to "
            "leave them as they are",
        )
    logger.warning("%s: %s", checkpoint.directory, what)


def _units(entries: Mapping[str, TensorEntry], covered: Set[str]) -> dict[str, _Unit]:
    """The matrices of layers that are in no block, by the module that has them."""
    found: dict[str, _Unit] = {}
    for name, entry in entries.items():
        shape = entry.shape
        taken = take_numbers_out(name)
        if name in covered or taken is None or len(shape) not in (2, 3) or min(shape[-2:]) < 2:
            continue
        pattern, place = taken
        told = role_of(pattern)
        stem = name.removesuffix(".weight")
        if told is not None:
            unit, role = (stem.removesuffix(_ending(pattern, told[0])), told[1])
        elif not pattern.of_attention and any(_FFN.search(step) for step in pattern.rest.split(".")[:-1]):
            unit, role = stem.rpartition(".")[0] + ".", None
        else:
            continue
        one = found.setdefault(unit, _Unit(pattern, place))
        one.shapes[name], one.roles[name] = shape, role
    return found


def _ending(pattern: NamePattern, unit: str) -> str:
    """The steps of a name that tell its role."""
    return pattern.rest.removesuffix(".weight").removeprefix(f"{unit}." if unit else "")


def _sizes(into: Shape, out: Shape, axes: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Neurons and hidden size, as far as two matrices can be the way there (one or two in one) and the way back."""
    into, out = into[-2:], out[-2:]
    for axis, ((wide, hidden), (back, neurons)) in enumerate(((into, out), (into[::-1], out[::-1]))):
        if axis in axes and hidden == back and wide in (neurons, 2 * neurons):
            yield neurons, hidden


def _last_layers(covered: Set[str], config: Mapping[str, Any]) -> dict[str, int]:
    """The number of the last layer of each list with blocks: by the config, or that of the last block."""
    found: dict[str, int] = {}
    for name in covered:
        taken = take_numbers_out(name)
        if taken is not None:
            stack = taken[0].stack
            found[stack] = max(found.get(stack, 0), taken[1].layer)
    stated = {stack: count for stack in found if (count := layer_count(config, stack)) is not None}
    return {stack: max(last, stated[stack][1] - 1) if stack in stated else last for stack, last in found.items()}


def _list(names: Mapping[str, int], most: int = 5) -> str:
    shown = sorted(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
