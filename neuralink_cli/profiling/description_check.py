"""Whether the blocks of a running model compute what their description says.

While the first batch runs, one block of each kind in the first layer that has it and one in the last are computed a
second time, from the tensors that the description names, as they are in the checkpoint. What comes out is compared
with what the model's own module made of the same tokens. So an activation function other than the description's, a
clamp, a norm, a scale or a sparsity inside a block is found before anything is recorded.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from neuralink_cli.architectures.activation_names import split_most, with_most
from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import BlockPart, FFNBlock
from neuralink_cli.architectures.regions import Region, elements_of
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import DTYPE_BITS
from neuralink_cli.models.find_modules import find_activation, find_experts, find_module
from neuralink_cli.profiling.firing import firing_rule, has_parameters
from neuralink_cli.profiling.hooked_blocks import Shapes
from neuralink_cli.weight_formats.scaled import read_scales, widen_scaled

logger = logging.getLogger(__name__)

# Tokens that a block is computed again for.
ROWS = 64
# How far a value may be off, of the largest of its token, by rounding alone.
_TOLERANCE = {torch.float64: 3e-5, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# A token whose output is this small beside that of others is judged by theirs: its own may be nothing but rounding.
_SMALL_TOKEN = 0.01
# What else it might be, for the message.
_OTHER_ACTIVATIONS = ("relu", "silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "sigmoid", "tanh")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

Function = Callable[[torch.Tensor], torch.Tensor]


class DescriptionCheck:
    """Compares blocks of a model with their description while its context is entered, each on its first tokens only.

    Args:
        model: As it was loaded from `directory`.
        shapes: Of the tensors of the checkpoint, by name.
        told_by: What describes the blocks, for messages; the architecture if None.
    """

    def __init__(
        self,
        model: Any,
        directory: Path,
        blocks: Sequence[FFNBlock],
        shapes: Shapes,
        architecture: Architecture,
        told_by: str | None = None,
    ) -> None:
        self._model = model
        self._directory = directory
        self._shapes = shapes
        self._architecture = architecture
        self._told_by = f"architecture {architecture.name!r}" if told_by is None else told_by
        self._names = {id(module): name for name, module in model.named_modules()}
        self._chosen = [found for found in _first_and_last(blocks) if self._can_be_computed(found[0])]
        self._hooks = ExitStack()
        # Ids of the blocks that have not been compared yet; of experts that of the first of the layer.
        self._waiting = {found[0].id for found in self._chosen}
        self._compared: list[str] = []

    @property
    def compared(self) -> tuple[str, ...]:
        """Ids of the blocks that compute what is said of them."""
        return tuple(self._compared)

    def __enter__(self) -> DescriptionCheck:
        for found in self._chosen:
            if found[0].expert is not None:
                self._watch_experts(found)
            else:
                self._watch(found[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        if error is None and self._waiting:
            logger.warning(
                "whether the model computes what the architecture says is not tested: block %r did not run as a module",
                min(self._waiting),
            )

    def _function(self, block: FFNBlock) -> Function:
        """The activation of a block.

        Raises:
            UnsupportedError: It is not known.
        """
        own = None
        if block.expert is None and has_parameters(block.activation):
            part = block.firing_part
            module = find_module(self._model, part, self._shapes[part.weight], self._architecture)
            own = find_activation(self._model, module, block.activation)
        function: Function = firing_rule(block.id, block.activation, "gate", own).function
        return function

    def _can_be_computed(self, block: FFNBlock) -> bool:
        try:
            self._function(block)
        except UnsupportedError as error:
            logger.warning("whether the model computes what the architecture says is not tested: %s", error.what)
            return False
        return True

    def _watch(self, block: FFNBlock) -> None:
        """Compare a block that runs on every token when it has run."""
        modules = {
            part.role: find_module(self._model, part, self._shapes[part.weight], self._architecture)
            for part in block.parts
        }
        into: list[torch.Tensor] = []
        out: list[torch.Tensor] = []
        whole = self._whole(list(modules.values()))
        hooks = self._hooks.enter_context(ExitStack())

        def got(_module: Any, inputs: tuple[Any, ...], _output: Any) -> None:
            into[:] = [_some_rows(inputs[0])]

        def gave(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            out[:] = [_some_rows(output)]
            if whole is None:
                hooks.close()
                self._waiting.discard(block.id)
                self._compare(block, into[0], out[0])

        def ran(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            hooks.close()
            given = [value for value in (*inputs, *named.values()) if _is_hidden(value, block)]
            made = output[0] if isinstance(output, tuple) else output
            self._waiting.discard(block.id)
            if len(given) == 1 and _is_hidden(made, block) and made.numel() == given[0].numel():
                self._compare(block, _some_rows(given[0]), _some_rows(made))
            else:
                # Some modules are also given what they add their output to, beside which it may be small.
                self._compare(block, into[0], out[0])

        hooks.callback(modules["up"].register_forward_hook(got).remove)
        hooks.callback(modules["down"].register_forward_hook(gave).remove)
        if whole is not None:
            hooks.callback(whole.register_forward_hook(ran, with_kwargs=True).remove)

    def _whole(self, modules: Sequence[Any]) -> Any:
        """The module that holds all projections of a block and nothing else; None if only the layer holds them all."""
        paths = [self._names[id(module)].split(".")[:-1] for module in modules]
        shared = []
        for steps in zip(*paths, strict=False):
            if len(set(steps)) > 1:
                break
            shared.append(steps[0])
        if not shared or isinstance(self._model.get_submodule(".".join(shared[:-1])), torch.nn.ModuleList):
            return None
        return self._model.get_submodule(".".join(shared))

    def _watch_experts(self, blocks: Sequence[FFNBlock]) -> None:
        """Compare one of the experts of a layer when they have run: the first that tokens are routed to."""
        place = blocks[-1].expert
        assert place is not None
        module = find_experts(self._model, place, self._architecture)
        of_index = {block.expert.index: block for block in blocks if block.expert is not None}
        hooks = self._hooks.enter_context(ExitStack())

        def ran(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], _output: Any) -> None:
            hidden, chosen, weights = (*inputs, *named.values())[:3]
            index = next((i for i in chosen.unique().tolist() if i in of_index), None)
            if index is None:
                return
            hooks.close()
            self._waiting.discard(blocks[0].id)
            rows = _some_rows(hidden[(chosen == index).any(dim=-1)])
            # The module's own code, on this expert alone and with its output as it is.
            alone = torch.full((len(rows), 1), index, dtype=chosen.dtype, device=chosen.device)
            with _own_implementation(module):
                output = module(rows, alone, torch.ones(alone.shape, dtype=weights.dtype, device=weights.device))
            self._compare(of_index[index], rows, output)

        hooks.callback(module.register_forward_hook(ran, with_kwargs=True).remove)

    def _compare(self, block: FFNBlock, rows: torch.Tensor, result: torch.Tensor) -> None:
        """Compare what a block made of some tokens `[tokens, hidden]` with its description.

        Raises:
            UnsupportedError: The description says something else.
        """
        if rows.shape[-1] != block.hidden:
            raise UnsupportedError(
                f"block {block.id!r} takes {rows.shape[-1]} values of a token, but {self._told_by} says {block.hidden}",
                where=self._directory,
                fix="gate, up and down may be described with the wrong `neuron_axis`",
            )
        with Checkpoint(self._directory) as checkpoint:
            described = _Described(checkpoint, block, rows, self._architecture.up_activation)
            expected = described.output(self._function(block), result.dtype)
            difference = _difference(result, expected)
            # What is computed in two dtypes is as coarse as the coarser.
            allowed = max(_tolerance(rows.dtype), _tolerance(result.dtype))
            if any(part.weight in checkpoint.scaled for part in block.parts):
                # Some quantisers multiply codes and scales in the dtype of the scales.
                allowed = max(allowed, _TOLERANCE[torch.bfloat16])
            if difference <= allowed:
                self._compared.append(block.id)
                return
            exchanged = described.output(self._function(block), result.dtype, exchanged=True)
            if _difference(result, exchanged) <= allowed:
                hint = "with gate and up exchanged it would agree: correct the description"
            else:
                hint = _suspicion(described, result, expected, block.activation, allowed)
        raise UnsupportedError(
            f"block {block.id!r} computes something else than {self._told_by} says: its output is "
            f"off by {difference:.2g} of its largest value, rounding explains {allowed:.0e}",
            where=self._directory,
            fix=hint,
        )


@dataclass
class _Described:
    """A block as its description says, on some tokens."""

    checkpoint: Checkpoint
    block: FFNBlock
    rows: torch.Tensor
    up_activation: bool

    def __post_init__(self) -> None:
        # A matrix at a time, so that no more memory is taken than for one.
        self._values = {
            part.role: self._project(part, self.rows, self.rows.dtype)
            for part in self.block.parts
            if part.role != "down"
        }

    def output(self, function: Function, dtype: torch.dtype, *, exchanged: bool = False) -> torch.Tensor:
        """What the block gives with an activation; with `exchanged` if its gate were its up projection."""
        gate, up = self._values.get("gate"), self._values["up"]
        if exchanged and gate is not None:
            gate, up = up, gate
        of_up = self.block.up_values
        if of_up is not None:
            up = (up if of_up.limit is None else up.clamp(-of_up.limit, of_up.limit)) + of_up.plus
        if gate is None or self.up_activation:
            up = function(up)
        values = up if gate is None else function(gate) * up
        return self._project(self.block.part("down"), values, dtype)

    def _project(self, part: BlockPart, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        block = self.block
        matrix = self._read(block.region(part), part.dtype)
        if (part.neuron_axis == 0) == (part.role == "down"):
            matrix = matrix.T
        bias = None
        if part.bias is not None:
            stored = self.checkpoint.place(part.bias).entry.dtype
            place = block.bias_region(part, stored)
            if part.role == "down":
                place = place.some_lines(0, block.hidden)
            bias = self._read(place, stored).reshape(-1).to(values.device, dtype)
        return linear(values.to(dtype), matrix.to(values.device, dtype), bias)

    def _read(self, region: Region, dtype: str) -> torch.Tensor:
        """What lies in a region: a row of the result is a line of it.

        Raises:
            UnsupportedError: torch cannot compute with the dtype.
        """
        scales = read_scales(self.checkpoint, region.tensor, region)
        if dtype not in _DTYPES and scales is None:
            raise UnsupportedError(
                f"tensor {region.tensor!r}: tensors of dtype {dtype} cannot be computed with",
                where=self.checkpoint.directory,
            )
        # Of several parts side by side, the others' are read too.
        lines = np.zeros(region.lines * region.pitch, dtype=np.uint8)
        wanted = self.checkpoint.place(region.tensor).stretch(region.start, region.stop)
        wanted.file.read_at(wanted.offset, lines[: wanted.size])
        if scales is not None:
            lines, region = widen_scaled(lines, region, scales)
            dtype = "F32"
        own = np.ascontiguousarray(elements_of(lines, region, DTYPE_BITS[dtype] // 8))
        return torch.from_numpy(own.view(np.uint8)).view(_DTYPES[dtype])


def _first_and_last(blocks: Sequence[FFNBlock]) -> list[list[FFNBlock]]:
    """Of each kind of block the first and the last; of experts all of the first and of the last layer that has them."""
    kinds: dict[Any, dict[str, list[FFNBlock]]] = {}
    for block in blocks:
        roles = tuple((part.role, part.neuron_axis, part.bias is None) for part in block.parts)
        said = (re.sub("[0-9]+", "", block.id), block.activation, block.up_values, roles)
        layers = kinds.setdefault(said, {})
        layers.setdefault(block.id if block.expert is None else block.expert.module, []).append(block)
    return [layers[name] for layers in kinds.values() for name in dict.fromkeys([next(iter(layers)), [*layers][-1]])]


def _is_hidden(value: Any, block: FFNBlock) -> bool:
    """Whether something holds hidden states."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (block.hidden,)


def _some_rows(values: torch.Tensor) -> torch.Tensor:
    """Some of the tokens, from everywhere in the batch."""
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows[:: max(len(rows) // ROWS, 1)][:ROWS].clone()


@contextmanager
def _own_implementation(module: Any) -> Iterator[None]:
    """Within the block an experts module runs the code that its class comes with."""
    config = getattr(module, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "eager"  # type: ignore[union-attr]
    try:
        yield
    finally:
        config._experts_implementation = before  # type: ignore[union-attr]


def _tolerance(dtype: torch.dtype) -> float:
    # Matrix products of float32 may have been allowed to be as coarse as those of bfloat16.
    coarse = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE[torch.bfloat16 if coarse or dtype not in _TOLERANCE else dtype]


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a token, of its largest value; tokens that are not finite are left to others.

    It is infinite if one of the two has finite tokens, but none that both have.
    """
    result, expected = result.float(), expected.float()
    finite, other = (values.isfinite().all(dim=-1) for values in (result, expected))
    both = finite & other
    if not both.any():
        return math.inf if (finite | other).any() else 0.0
    result, expected = result[both], expected[both]
    largest = torch.maximum(result.abs().amax(dim=-1), expected.abs().amax(dim=-1))
    size = torch.maximum(largest, _SMALL_TOKEN * largest.max()).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((result - expected).abs().amax(dim=-1) / size).max())


def _suspicion(
    described: _Described, result: torch.Tensor, expected: torch.Tensor, activation: str, allowed: float
) -> str:
    """What the matter may be."""
    most, _ = split_most(activation)
    clamped = () if most is None else tuple(with_most(name, most) for name in _OTHER_ACTIVATIONS)
    for name in (*_OTHER_ACTIVATIONS, *clamped):
        function = firing_rule(described.block.id, name, "gate").function
        if name != activation and _difference(result, described.output(function, result.dtype)) <= allowed:
            return f"with activation {name!r} instead of {activation!r} it would agree: correct the description"
    squares = float(expected.float().square().sum())
    factor = float((expected.float() * result.float()).sum()) / squares if squares else 0.0
    if _difference(result, factor * expected.float()) <= allowed:
        return f"it is {factor:.4g} times as much: a scale inside the block is suspected, which cannot be described"
    return (
        f"suspected are an activation other than {activation!r}, one with clamps or a sparsity of its own, gate and up "
        "that lie otherwise, or a norm or scale inside the block; docs/architectures.md says what can be described"
    )
