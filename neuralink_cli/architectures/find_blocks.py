"""Finds the FFN blocks of a checkpoint by the patterns of its architecture, and checks their tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from string import Template
from typing import Any

from neuralink_cli.architectures.activation_names import swish, with_cut, with_most
from neuralink_cli.architectures.architecture import Architecture, BlockPattern, ConfigNumber, WeightPattern
from neuralink_cli.architectures.block_modules import module_patterns, require_described
from neuralink_cli.architectures.blocks import BlockPart, ExpertPlace, FFNBlock, UpValues, moved_pieces
from neuralink_cli.architectures.inference_names import take_numbers_out
from neuralink_cli.architectures.regions import cut_into_slabs
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.config import config_value
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.files.header import DTYPE_BITS

# What wrappers of single modules put into the names of tensors.
_INSIDE = re.compile(r"_(fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")


def find_blocks(checkpoint: Checkpoint, architecture: Architecture) -> tuple[FFNBlock, ...]:
    """All FFN blocks of a checkpoint, in layer order, the encoder before the decoder.

    Raises:
        InputError: A tensor is missing or its shape does not fit the others.
        UnsupportedError: A dtype whose columns are not whole bytes, a tensor that holds more than FFN weights, or one
            in the module of a block that the architecture does not describe.
    """
    search = _Search(checkpoint, architecture, _find_prefix(checkpoint, architecture))
    activation = activation_name(checkpoint, architecture)
    blocks = tuple(
        block
        for _, patterns in groupby(architecture.blocks, lambda pattern: (pattern.layer_keys, _stack(pattern)))
        for block in search.blocks(tuple(patterns), activation)
    )
    require_described(checkpoint, blocks, search.modules, architecture, search.prefix)
    _require_whole_tensors(checkpoint, blocks)
    return blocks


def activation_name(checkpoint: Checkpoint, architecture: Architecture) -> str:
    """The activation that decides firing, as the config names it, with a clamp if there is one.

    Raises:
        InputError: The config does not name it, and there is no default; or a number of it is none.
    """
    slope, most = (_number(checkpoint, number) for number in (architecture.slope, architecture.at_most))
    name = _name_in_config(checkpoint, architecture) if slope is None else swish(slope)
    return name if most is None else with_most(name, most)


def _name_in_config(checkpoint: Checkpoint, architecture: Architecture) -> str:
    for key in architecture.activation_keys:
        value = config_value(checkpoint.config, key)
        if isinstance(value, str):
            return architecture.activation_names.get(value, value)
    if architecture.activation_default is None:
        keys = " or ".join(architecture.activation_keys)
        raise InputError(f"does not name the activation ({keys})", where=checkpoint.directory / CONFIG_FILE)
    return architecture.activation_default


@dataclass(frozen=True)
class _Search:
    """Looks up patterns under a prefix in a checkpoint.

    Attributes:
        modules: The modules of the blocks found so far, by name: the id of their block.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    prefix: str
    modules: dict[str, str] = field(default_factory=dict)

    def blocks(self, patterns: tuple[BlockPattern, ...], activation: str) -> Iterator[FFNBlock]:
        """The blocks of one stack of layers. A layer has the patterns whose up projection is in the checkpoint."""
        some = self.architecture.layers_without_blocks
        if not some and not any(self._present(pattern, 0) for pattern in patterns):
            # For example, a checkpoint with only the encoder or only the decoder.
            return
        for layer in self._layers(patterns):
            found = [pattern for pattern in patterns if self._present(pattern, layer)]
            if not found and some:
                continue
            if not found:
                name = self._name(patterns[0].parts["up"].weight, layer, 0)
                raise InputError(f"tensor {name!r} is missing", where=self.checkpoint.directory)
            if len({pattern.id for pattern in found}) < len(found):
                raise InputError(f"layer {layer} stores a block in two ways", where=self.checkpoint.directory)
            for pattern in found:
                experts = self._experts(pattern, layer)
                in_layer = with_cut(activation, _share_cut(self.checkpoint, self.architecture, layer))
                for expert in experts:
                    block = self._build(pattern, layer, expert, in_layer)
                    for module in module_patterns(pattern):
                        self.modules.setdefault(self._name(module, layer, expert), block.id)
                    yield replace(block, expert=self._expert_place(pattern, layer, expert, len(experts)))

    @cached_property
    def _up_values(self) -> UpValues | None:
        pattern = self.architecture.up_values
        return None if pattern is None else UpValues(_number(self.checkpoint, pattern.limit), pattern.plus)

    def _layers(self, patterns: tuple[BlockPattern, ...]) -> Iterable[int]:
        """The numbers of the layers to look at."""
        stated = _count(self.checkpoint, patterns[0].layer_keys)
        if self.architecture.layers_without_blocks:
            return [layer for layer in _layers_in_names(self.checkpoint) if stated is None or layer < stated]
        if stated is not None:
            return range(stated)
        layers = 0
        while any(self._present(pattern, layers) for pattern in patterns):
            layers += 1
        return range(layers)

    def _present(self, pattern: BlockPattern, layer: int) -> bool:
        # Other kinds of blocks may share the other tensors.
        return self._name(pattern.parts["up"].weight, layer, 0) in self.checkpoint

    def _experts(self, pattern: BlockPattern, layer: int) -> Sequence[int | None]:
        if pattern.experts is None:
            return (None,)
        up = pattern.parts["up"]
        stated = _count(self.checkpoint, pattern.experts.count_keys)
        if not up.per_expert:
            shape = self._entry(self._name(up.weight, layer, 0)).shape
            found = shape[0] if len(shape) == 3 else 0
        elif stated is not None:
            # A missing expert is found when its tensors are looked up.
            found = stated
        else:
            found = 0
            while self._name(up.weight, layer, found) in self.checkpoint:
                found += 1
        if found == 0 or (stated is not None and stated != found):
            expected = "at least one is needed" if stated is None else f"config.json says {stated}"
            raise InputError(f"layer {layer} has {found} experts, but {expected}", where=self.checkpoint.directory)
        return range(found)

    def _expert_place(self, pattern: BlockPattern, layer: int, expert: int | None, experts: int) -> ExpertPlace | None:
        if pattern.experts is None or expert is None:
            return None
        per_token = _count(self.checkpoint, pattern.experts.per_token_keys) or experts
        module = self._name(pattern.experts.module, layer, expert)
        return ExpertPlace(module, expert, min(per_token / experts, 1.0))

    def _build(self, pattern: BlockPattern, layer: int, expert: int | None, activation: str) -> FFNBlock:
        where = self.checkpoint.directory
        built = {role: self._part(role, weight, layer, expert) for role, weight in pattern.parts.items()}
        first, (neurons, hidden) = next(iter(built.values()))
        for part, shape in built.values():
            if shape != (neurons, hidden):
                stored = [list(self._entry(name).shape) for name in (part.weight, first.weight)]
                raise InputError(
                    f"tensor {part.weight!r} of shape {stored[0]} does not fit {first.weight!r} of {stored[1]}",
                    where=where,
                )
            if part.bias is not None:
                share = pattern.parts[part.role].share
                self._check_bias(part, hidden if part.role == "down" else neurons * share[1], expert)
        block_id = _substitute(pattern.id, layer, expert)
        parts = tuple(part for part, _ in built.values())
        return FFNBlock(block_id, neurons, hidden, activation, parts, up_values=self._up_values)

    def _part(
        self, role: str, pattern: WeightPattern, layer: int, expert: int | None
    ) -> tuple[BlockPart, tuple[int, int]]:
        """A part, its number of neurons, and its weights per neuron."""
        weight = self._name(pattern.weight, layer, expert)
        entry = self._entry(weight)
        stacked = expert is not None and not pattern.per_expert
        if len(entry.shape) != (3 if stacked else 2) or 0 in entry.shape:
            kind = "a stack of matrices" if stacked else "a matrix"
            raise InputError(
                f"tensor {weight!r} has shape {list(entry.shape)}, but {kind} is needed",
                where=self.checkpoint.directory,
            )
        matrix = entry.shape[-2:]
        share, of = pattern.share
        neurons, hidden = matrix[pattern.neuron_axis] // of, matrix[1 - pattern.neuron_axis]
        if neurons * of != matrix[pattern.neuron_axis]:
            raise InputError(
                f"tensor {weight!r} of shape {list(entry.shape)} does not split into {of} equal parts",
                where=self.checkpoint.directory,
            )
        index = expert if stacked and expert is not None else 0
        # Neurons before the first, and from each to the next.
        first, step = (share - 1, of) if pattern.alternating else ((share - 1) * neurons, 1)
        rows = pattern.neuron_axis == 0
        lane, lanes = (0, 1) if rows or step == 1 else (first, step)
        before = first * hidden if rows else first if lanes == 1 else 0
        bias = None if pattern.bias is None else self._name(pattern.bias, layer, expert)
        if bias is not None and bias not in self.checkpoint:
            bias = None
        for name in (weight, bias):
            if name is not None and DTYPE_BITS[self._entry(name).dtype] % 8:
                raise UnsupportedError(
                    f"tensor {name!r} has dtype {self._entry(name).dtype}, whose columns are not whole bytes",
                    where=self.checkpoint.directory,
                )
        # That of down has an entry per output, whatever its weights share.
        of_bias = (hidden, 0, 1) if role == "down" else (neurons * of, first, step)
        part = BlockPart(
            role=role,
            weight=weight,
            neuron_axis=pattern.neuron_axis,
            dtype=entry.dtype,
            bias=bias,
            start=index * matrix[0] * matrix[1] + before,
            pitch=matrix[1] * (step if rows else 1),
            bias_start=0 if bias is None else index * of_bias[0] + of_bias[1],
            bias_step=of_bias[2],
            lane=lane,
            lanes=lanes,
            module=None if pattern.module is None else self._name(pattern.module, layer, expert),
        )
        return part, (neurons, hidden)

    def _check_bias(self, part: BlockPart, entries: int, expert: int | None) -> None:
        assert part.bias is not None
        found = self._entry(part.bias).shape
        fits = found[-1:] == (entries,) and len(found) <= (1 if expert is None else 2)
        if not fits or math.prod(found[:-1]) <= part.bias_start // entries:
            wanted = f"not [{entries}]" if expert is None else f"which is not {entries} for each expert"
            raise InputError(f"tensor {part.bias!r} has shape {list(found)}, {wanted}", where=self.checkpoint.directory)

    def _entry(self, name: str) -> Any:
        return self.checkpoint.place(name).entry

    def _name(self, pattern: str, layer: int, expert: int | None) -> str:
        return self.prefix + _substitute(pattern, layer, expert)


def _number(checkpoint: Checkpoint, number: ConfigNumber | None) -> float | None:
    """A number that an architecture looks for in the config.

    Raises:
        InputError: The config has something else there.
    """
    for key in () if number is None else number.keys:
        value = config_value(checkpoint.config, key)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{key} is not a number above 0", where=checkpoint.directory / CONFIG_FILE)
        return float(value)
    return None if number is None else number.default


def _share_cut(checkpoint: Checkpoint, architecture: Architecture, layer: int) -> float:
    """The share of neurons that a layer cuts off before its activation.

    Raises:
        InputError: The config has something else there.
    """
    for key in architecture.cut_keys:
        stated = config_value(checkpoint.config, key)
        if stated is None:
            continue
        value = stated[layer] if isinstance(stated, list) and layer < len(stated) else stated
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(
                f"{key} names no share of neurons for layer {layer}", where=checkpoint.directory / CONFIG_FILE
            )
        return float(value)
    return 0.0


def _layers_in_names(checkpoint: Checkpoint) -> list[int]:
    """The layers that the tensors of a checkpoint are in, by the first number in their names."""
    taken = (take_numbers_out(name) for name in checkpoint.tensors)
    return sorted({place.layer for _, place in filter(None, taken)})


def _find_prefix(checkpoint: Checkpoint, architecture: Architecture) -> str:
    layers = _layers_in_names(checkpoint) if architecture.layers_without_blocks else []
    ups = [pattern.parts["up"].weight for pattern in architecture.blocks]
    firsts = [_substitute(up, layer, 0) for layer in layers or (0,) for up in ups]
    for prefix in architecture.prefixes:
        if any(prefix + first in checkpoint for first in firsts):
            return prefix
    wanted = {prefix + first for prefix in architecture.prefixes for first in firsts}
    missing = f"tensor {architecture.prefixes[0] + firsts[0]!r} of architecture {architecture.name!r} is missing"
    wrapper = _find_wrapper(checkpoint, architecture, firsts)
    if wrapper is not None:
        raise InputError(
            f"{missing}; its name there starts with {wrapper!r}, as a wrapper (DDP, torch.compile, PEFT) leaves it",
            where=checkpoint.directory,
            fix=f"save the model inside the wrapper with save_pretrained, or rename the tensors without {wrapper!r}",
        )
    inside = next(
        (name for name in checkpoint.tensors if _INSIDE.search(name) and _INSIDE.sub("", name) in wanted), None
    )
    if inside is not None:
        raise InputError(
            f"{missing}; it is called {inside!r} there, as a wrapper (FSDP, torch.compile, checkpointing) leaves it",
            where=checkpoint.directory,
            fix="save the model inside the wrapper with save_pretrained, or rename the tensors without such steps",
        )
    raise InputError(missing, where=checkpoint.directory)


def _find_wrapper(checkpoint: Checkpoint, architecture: Architecture, firsts: Sequence[str]) -> str | None:
    """What comes before the names that the architecture knows. transformers would not find these weights either."""
    longest_first = sorted(architecture.prefixes, key=len, reverse=True)
    for prefix in longest_first:
        for name in checkpoint.tensors:
            for first in firsts:
                if name.endswith(f".{prefix}{first}"):
                    return name.removesuffix(prefix + first)
    return None


def _stack(pattern: BlockPattern) -> str:
    """The part of a block's id before the layers: encoder or decoder, or nothing."""
    return pattern.id.partition("layers.")[0]


def _count(checkpoint: Checkpoint, keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config_value(checkpoint.config, key)
        if type(value) is int and value > 0:
            return value
    return None


def _substitute(pattern: str, layer: int, expert: int | None) -> str:
    return Template(pattern).substitute(layer=layer, expert=expert)


def _require_whole_tensors(checkpoint: Checkpoint, blocks: tuple[FFNBlock, ...]) -> None:
    """Check that blocks use their tensors completely: a layout stores only the blocks, and the rest would be lost."""
    try:
        for name, pieces in moved_pieces(checkpoint, blocks).items():
            cut_into_slabs(pieces, checkpoint.place(name).entry.nbytes)
    except ValueError as error:
        raise UnsupportedError(f"tensor {name!r}: {error}", where=checkpoint.directory) from None
