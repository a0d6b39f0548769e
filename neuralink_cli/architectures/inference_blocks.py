"""Finds the FFN blocks of a model whose architecture is not known, by names and shapes of tensors.

A block is found if names tell the roles of its weights and shapes agree with the sizes in the config. If two readings
are possible, or if another tensor of the layer might belong to its neurons, inference refuses: reordering the wrong
rows scrambles the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from neuralink_cli.architectures.inference_config import Sizes, expert_count, layer_count, read_sizes
from neuralink_cli.architectures.inference_names import (
    EXPERT,
    LAYER,
    NamePattern,
    Place,
    role_of,
    settle_roles,
    take_numbers_out,
)
from neuralink_cli.checkpoint.model_description import ModelDescription

Shape = tuple[int, ...]
Shapes = Mapping[NamePattern, Mapping[Place, Shape]]
# More than any model has.
_MOST_KINDS = 100
_ROLES = {frozenset({"up", "down"}), frozenset({"gate", "up", "down"}), frozenset({"gate_up", "down"})}


@dataclass(frozen=True)
class Unit:
    """Weights whose names make them one kind of block. `key` is the part that their names share after the layer."""

    stack: str
    key: str
    weights: Mapping[str, NamePattern]

    @property
    def per_expert(self) -> bool:
        """Whether every expert has tensors of its own."""
        return EXPERT in self.key

    def __str__(self) -> str:
        return ", ".join(repr(str(pattern)) for pattern in self.weights.values())


@dataclass(frozen=True)
class Kind:
    """A unit whose shapes fit: the axis along which the neurons of its up projection run, and how many there are."""

    unit: Unit
    up_axis: int
    neurons: frozenset[int]
    layers: frozenset[int]
    experts: int | None
    with_bias: frozenset[str]

    def has_bias(self, role: str) -> bool:
        """Whether the weight of a role has a bias in any layer."""
        fused = role != "down" and "gate_up" in self.unit.weights
        return ("gate_up" if fused else role) in self.with_bias

    @property
    def key(self) -> str:
        """The name of its module within a layer."""
        return self.unit.key.removesuffix(f".{EXPERT}")


def find_kinds(model: ModelDescription) -> tuple[list[str], list[Kind]]:
    """The names of the lists of layers, the encoder's before the decoder's, and the kinds of blocks in them.

    Raises:
        UnsupportedError: No blocks are found, or another reading is possible.
    """
    sizes = read_sizes(model)
    shapes = _shapes_by_pattern(model)
    units = _units(shapes, sizes, model)
    outputs_first = _outputs_first(shapes)
    kinds = [kind for unit in units if (kind := _fit(unit, shapes, sizes, outputs_first, model)) is not None]
    if not kinds:
        raise model.refusal(_nothing_found(shapes, sizes))
    if len(kinds) > _MOST_KINDS:
        raise model.refusal(f"there would be {len(kinds)} kinds of blocks, {kinds[0].unit} and others")
    stacks = _stacks(kinds, model)
    for stack in stacks:
        of_stack = [kind for kind in kinds if kind.unit.stack == stack]
        _require_every_layer(stack, of_stack, model)
        _require_nothing_else(stack, of_stack, shapes, sizes, model)
    return stacks, kinds


def _shapes_by_pattern(model: ModelDescription) -> Shapes:
    """The tensors of layers, without layers beyond the config's number."""
    found: dict[NamePattern, dict[Place, Shape]] = {}
    counted: dict[str, tuple[str, int] | None] = {}
    for name, shape in model.shapes.items():
        taken = take_numbers_out(name)
        if taken is None:
            continue
        pattern, place = taken
        if pattern.stack not in counted:
            counted[pattern.stack] = layer_count(model.config, pattern.stack)
        stated = counted[pattern.stack]
        if stated is None or place.layer < stated[1]:
            found.setdefault(pattern, {})[place] = shape
    return found


def _units(shapes: Shapes, sizes: Sizes, model: ModelDescription) -> list[Unit]:
    """Weights with the names and sizes of the parts of a block, in the order of their names."""
    found: dict[tuple[str, str], dict[str, NamePattern]] = {}
    for unit, role, pattern in _roles(shapes):
        if any(_may_be_weight(shape, sizes) for shape in shapes[pattern].values()):
            other = found.setdefault(unit, {}).setdefault(role, pattern)
            if other != pattern:
                raise model.refusal(f"{str(other)!r} and {str(pattern)!r} both look like a block's {role} projection")
    return _complete(found)


def _may_be_weight(shape: Shape, sizes: Sizes) -> bool:
    """Whether a tensor has the shape of a projection, or of two in one."""
    rows, columns = shape[-2:] if len(shape) > 1 else (0, 0)
    lengths = sizes.neurons | {2 * count for count in sizes.neurons}
    return (rows == sizes.hidden and columns in lengths) or (columns == sizes.hidden and rows in lengths)


def _roles(shapes: Shapes) -> Iterator[tuple[tuple[str, str], str, NamePattern]]:
    """The stack and key of its unit, its role and its pattern, for every weight whose name tells them."""
    for pattern in sorted(shapes, key=str):
        told = role_of(pattern)
        if told is not None:
            yield (pattern.stack, told[0]), told[1], pattern


def _complete(found: Mapping[tuple[str, str], dict[str, NamePattern]]) -> list[Unit]:
    """The units with all parts of a block."""
    settled = [Unit(stack, key, settle_roles(roles)) for (stack, key), roles in found.items()]
    return [unit for unit in settled if frozenset(unit.weights) in _ROLES]


def _fit(unit: Unit, shapes: Shapes, sizes: Sizes, outputs_first: bool | None, model: ModelDescription) -> Kind | None:
    """A unit as a kind of block; None if its shapes fit in no layer."""
    places = {place for pattern in unit.weights.values() for place in shapes[pattern]}
    neurons: dict[int, set[int]] = {}
    misfits: dict[int, Place] = {}
    for axis in (0, 1):
        for place in places:
            count = _neurons(unit, shapes, place, axis, sizes)
            if count is not None:
                neurons.setdefault(axis, set()).add(count)
            elif axis not in misfits or place.layer < misfits[axis].layer:
                misfits[axis] = place
    if not neurons:
        return None
    axes = [axis for axis in neurons if axis not in misfits]
    if not axes:
        place = misfits[min(neurons)]
        shown = _shown(unit.weights.values(), shapes, place)
        raise model.refusal(f"layer {place.layer} is unlike the others: {shown} do not fit {sizes}")
    if len(axes) > 1:
        stacked = any(len(shape) == 3 for shape in shapes[unit.weights["down"]].values())
        if outputs_first is None or stacked:
            shown = _shown(unit.weights.values(), shapes, min(places, key=lambda place: place.layer))
            raise model.refusal(f"neurons may be the rows or the columns of {shown}: both have as many")
        axes = [0 if outputs_first else 1]
    if "gate_up" in unit.weights and axes == [1]:
        name = str(unit.weights["gate_up"])
        raise model.refusal(f"tensor {name!r} has gate and up columns, which may lie one after the other or alternate")
    _check_biases(unit, shapes, axes[0], model)
    layers = frozenset(place.layer for place in places)
    with_bias = frozenset(role for role, pattern in unit.weights.items() if pattern.bias in shapes)
    experts = _count_experts(unit, shapes, places, model)
    if experts is None and "expert" in unit.key.lower() and "share" not in unit.key.lower():
        raise model.refusal(f"{unit} look like an expert's weights, but no number between two dots tells which expert")
    return Kind(unit, axes[0], frozenset(neurons[axes[0]]), layers, experts, with_bias)


def _neurons(unit: Unit, shapes: Shapes, place: Place, up_axis: int, sizes: Sizes) -> int | None:
    """The number of neurons of a block if its up projection has them along `up_axis`; None if the shapes do not fit."""
    found = set()
    stacked = set()
    for role, pattern in unit.weights.items():
        shape = shapes[pattern].get(place, ())
        if len(shape) not in (2, 3) or 0 in shape:
            return None
        stacked.add(tuple(shape[:-2]))
        axis = 1 - up_axis if role == "down" else up_axis
        count, rest = divmod(shape[-2:][axis], 2 if role == "gate_up" else 1)
        if rest or shape[-2:][1 - axis] != sizes.hidden:
            return None
        found.add(count)
    if len(found) > 1 or len(stacked) > 1 or not found <= sizes.neurons:
        return None
    # A tensor with three axes holds the experts of a layer, and its name tells.
    if stacked != {()} and (unit.per_expert or not re.search("expert|moe", unit.key.lower())):
        return None
    return found.pop()


def _check_biases(unit: Unit, shapes: Shapes, up_axis: int, model: ModelDescription) -> None:
    """Check that biases have one entry per output. The outputs of up projections are neurons, those of down are not."""
    for role, pattern in unit.weights.items():
        for place, shape in shapes.get(pattern.bias, {}).items():
            weight = shapes[pattern].get(place)
            if weight is None or tuple(shape) != (*weight[:-2], weight[-2:][up_axis]):
                shown = _shown([pattern.bias, pattern], shapes, place)
                raise model.refusal(f"{shown} do not fit each other as bias and weight of the {role} projection")


def _outputs_first(shapes: Shapes) -> bool | None:
    """Whether matrices are stored as in Linear (or as in Conv1D), judged by the biases of non-square matrices.

    None if there are no such biases, or they do not agree.
    """
    seen = set()
    for pattern, places in shapes.items():
        biases = shapes.get(pattern.bias, {})
        for place, shape in places.items():
            bias = biases.get(place)
            if bias is not None and len(shape) == 2 and shape[0] != shape[1] and len(bias) == 1:
                seen |= {axis for axis in (0, 1) if shape[axis] == bias[0]}
    return seen == {0} if len(seen) == 1 else None


def _count_experts(unit: Unit, shapes: Shapes, places: set[Place], model: ModelDescription) -> int | None:
    """How many experts every layer has; None if the blocks are not experts."""
    if unit.per_expert:
        numbers: dict[int, set[int]] = {}
        for place in places:
            assert place.expert is not None
            numbers.setdefault(place.layer, set()).add(place.expert)
        gaps = [layer for layer, found in numbers.items() if max(found) + 1 != len(found)]
        if gaps:
            raise model.refusal(f"experts of layer {min(gaps)} are missing: {unit}")
        counts = {len(found) for found in numbers.values()}
    else:
        counts = {shape[0] if len(shape) == 3 else 0 for shape in shapes[unit.weights["down"]].values()}
        if counts == {0}:
            return None
    stated = expert_count(model.config)
    if stated is not None and counts != {stated[1]}:
        raise model.refusal(f"layers have {sorted(counts)} experts, but config.json says {stated[1]} ({stated[0]})")
    if 0 in counts:
        raise model.refusal(f"some layers have experts and others do not, under the same names ({unit})")
    return max(counts)


def _stacks(kinds: Sequence[Kind], model: ModelDescription) -> list[str]:
    """The lists of layers with blocks: one list, or an encoder's and a decoder's."""
    stacks = sorted({kind.unit.stack for kind in kinds}, key=lambda stack: ("decoder" in stack.split("."), stack))
    sides = ["decoder" in stack.split(".") for stack in stacks]
    if len(stacks) > 1 and not (sides == [False, True] and "encoder" in stacks[0].split(".")):
        listed = ", ".join(stack + LAYER for stack in stacks[:4])
        raise model.refusal(f"{len(stacks)} lists of layers have FFN blocks ({listed})")
    return stacks


def _require_every_layer(stack: str, kinds: Sequence[Kind], model: ModelDescription) -> None:
    found = {layer for kind in kinds for layer in kind.layers}
    stated = layer_count(model.config, stack)
    wanted = max(found) + 1 if stated is None else stated[1]
    if len(found) != wanted:
        first = next(layer for layer in range(wanted) if layer not in found)
        raise model.refusal(f"no FFN block is recognised in layer {first} of {wanted} ({stack}{first})")


def _require_nothing_else(
    stack: str, kinds: Sequence[Kind], shapes: Shapes, sizes: Sizes, model: ModelDescription
) -> None:
    """Refuse a layer with a tensor outside the blocks that might have an entry, row or column per neuron."""
    weights = [pattern for kind in kinds for pattern in kind.unit.weights.values()]
    known = {*weights, *(pattern.bias for pattern in weights)}
    within = tuple(kind.unit.key + "." for kind in kinds if kind.unit.key)
    suspect: set[int] = set()
    for kind in kinds:
        suspect |= kind.neurons | ({2 * n for n in kind.neurons} if "gate_up" in kind.unit.weights else set())
    for pattern, places in shapes.items():
        if pattern.stack != stack or pattern in known:
            continue
        inside = pattern.rest.startswith(within)
        if pattern.of_attention and not inside:
            continue
        # If there are as many neurons as the hidden size, every norm of a layer would look like it belongs to neurons.
        lengths = suspect if inside else suspect - {sizes.hidden}
        for place, shape in places.items():
            if lengths & set(shape):
                shown = _shown([pattern], shapes, place)
                raise model.refusal(
                    f"{shown} may belong to the neurons of {kinds[0].unit}, but its name does not tell how"
                )


def _nothing_found(shapes: Shapes, sizes: Sizes) -> str:
    """Why no blocks were found: names without fitting sizes, sizes without fitting names, or neither."""
    named: dict[tuple[str, str], dict[str, NamePattern]] = {}
    for unit, role, pattern in _roles(shapes):
        named.setdefault(unit, {})[role] = pattern
    for found in _complete(named):
        place = min(shapes[found.weights["down"]], key=lambda place: (place.layer, place.expert or 0))
        return f"{_shown(found.weights.values(), shapes, place)} do not fit {sizes} of config.json"
    fitting = [
        _shown([pattern], shapes, place)
        for pattern in shapes
        for place in list(shapes[pattern])[:1]
        if not pattern.of_attention and _may_be_weight(shapes[pattern][place], sizes)
    ]
    what = f"tensors of that size are {', '.join(fitting[:4])}" if fitting else "none has that size"
    return f"no tensor names look like the up and down projections of a block with {sizes}; {what}"


def _shown(patterns: Iterable[NamePattern], shapes: Shapes, place: Place) -> str:
    """Tensors at a place with their shapes."""
    return ", ".join(
        f"{place.name(pattern)!r} {list(shapes[pattern][place])}" for pattern in patterns if place in shapes[pattern]
    )
