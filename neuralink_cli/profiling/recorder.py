"""Hooks the FFN blocks of a running model, and turns their signals into recorded bits or thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch

from neuralink_cli.activations.spool import Spool
from neuralink_cli.activations.threshold import BlockHistograms, MagnitudeHistogram
from neuralink_cli.calibration.batches import ModelBatch
from neuralink_cli.errors import InputError, UnsupportedError, first_line
from neuralink_cli.models.model_errors import explained_model_errors
from neuralink_cli.models.offload import explained_offloading, input_device
from neuralink_cli.profiling.experts import ExpertRun, experts_seen
from neuralink_cli.profiling.firing import FiringRule, magnitude_counts, not_a_number, require_numbers
from neuralink_cli.profiling.packing import FiredBits, pack_fired

Advance = Callable[[int], object]


@dataclass(frozen=True)
class HookedBlock:
    """Where the firing signal of a block is seen: the output of `module`, or its input if `before`.

    Attributes:
        first: Where the block's neurons start in the output, which may hold several parts.
        expert: The number of the expert in `module`; None if the block runs on all tokens.
        activation: The module that is expected to turn the output into the signal, if there is one.
    """

    module: Any
    before: bool
    neurons: int
    rule: FiringRule
    first: int = 0
    expert: int | None = None
    activation: Any = None


# Called with the index of a block, its signal `[tokens, neurons]` without padding, and the positions of these tokens in
# the batch, without padding and ascending; None for all tokens.
Receive = Callable[[int, torch.Tensor, torch.Tensor | None], None]


class HookedModel:
    """A model that hands over what its FFN blocks compute. The hooks exist while its context is entered."""

    def __init__(self, model: Any, blocks: Sequence[HookedBlock]) -> None:
        self._model = model
        self.blocks = blocks
        self._hooks = ExitStack()
        self._batch: _RunningBatch | None = None

    def __enter__(self) -> HookedModel:
        experts: dict[int, dict[int, int]] = {}
        for index, block in enumerate(self.blocks):
            if block.expert is not None:
                experts.setdefault(id(block.module), {})[block.expert] = index
            elif block.before:
                self._hooks.callback(block.module.register_forward_pre_hook(self._before(index)).remove)
            else:
                self._hooks.callback(block.module.register_forward_hook(self._after(index)).remove)
            if block.activation is not None:
                self._hooks.callback(block.activation.register_forward_hook(self._activated(index)).remove)
        modules = {id(block.module): block.module for block in self.blocks}
        seen = [(modules[key], partial(self._see_expert, indexes)) for key, indexes in experts.items()]
        self._hooks.enter_context(experts_seen(seen))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def run(self, batch: ModelBatch, receive: Receive) -> None:
        """Run a batch through the model.

        Args:
            receive: Called once per block, in the order in which the model runs them; for an expert only if tokens are
                routed to it. The signal is in the order of the sequences.

        Raises:
            InputError: The device has not enough memory.
            UnsupportedError: A block did not run exactly once on every token, or needs offloaded weights.
        """
        device, dtype = input_device(self._model), self._model.dtype
        inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
        inputs = {name: array.to(dtype) if array.is_floating_point() else array for name, array in inputs.items()}
        running = self._batch = _RunningBatch(self.blocks, batch, device, receive)
        try:
            with explained_model_errors(self._model), torch.inference_mode(), explained_offloading():
                self._model(**inputs)
                running.settle()
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"the device has not enough memory ({first_line(error)})",
                fix="lower --batch-size or --max-seq-length, or use --device cpu",
            ) from None
        finally:
            self._batch = None
        running.require_all_seen()

    def _before(self, index: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            if self._batch is not None:
                self._batch.hand_over(index, self._batch.values(index, inputs[0]))

        return hook

    def _after(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            if self._batch is not None:
                self._batch.projected(index, self._batch.values(index, output))

        return hook

    def _activated(self, index: int) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def hook(_module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if self._batch is not None:
                self._batch.activated(index, inputs, output)

        return hook

    def _see_expert(self, indexes: Mapping[int, int], run: ExpertRun) -> None:
        index = indexes.get(run.number)
        if index is not None and self._batch is not None:
            self._batch.routed(index, run)


class _RunningBatch:
    """The state of a batch that runs through the model: where its padding is, and which blocks have run."""

    def __init__(
        self, blocks: Sequence[HookedBlock], batch: ModelBatch, device: torch.device, receive: Receive
    ) -> None:
        self._blocks = blocks
        self._receive = receive
        self._shape = batch.mask.shape
        padded = not batch.mask.all()
        self._mask = torch.from_numpy(batch.mask).to(device).reshape(-1) if padded else None
        # Computed once: otherwise every block would wait for the device.
        self._kept = torch.from_numpy(np.flatnonzero(batch.mask)).to(device) if padded else None
        self._seen: set[int] = set()
        # A block whose values the model is about to activate, and the values.
        self._pending: tuple[int, torch.Tensor] | None = None

    def require_all_seen(self) -> None:
        """Check that every block ran, except experts that no token was routed to.

        Raises:
            UnsupportedError: A block did not run.
        """
        for index, block in enumerate(self._blocks):
            if index not in self._seen and block.expert is None:
                raise UnsupportedError(f"the model did not run block {block.rule.block!r}")

    def values(self, index: int, seen: torch.Tensor) -> torch.Tensor:
        """The values of a block's own neurons in the output or input of its module.

        Raises:
            UnsupportedError: The block has run before, or not on the tokens of the batch.
        """
        block = self._blocks[index]
        width = seen.shape[-1]
        tokens = self._shape[0] * self._shape[1]
        if index in self._seen or width < block.first + block.neurons or seen.numel() != tokens * width:
            raise UnsupportedError(
                f"block {block.rule.block!r} does not run once on all tokens (its values are {list(seen.shape)}, "
                f"the tokens are {list(self._shape)} and its neurons {block.neurons})"
            )
        self._seen.add(index)
        return seen.detach()[..., block.first : block.first + block.neurons]

    def projected(self, index: int, values: torch.Tensor) -> None:
        """Take the values of a block before they are activated."""
        self.settle()
        self._pending = (index, values)
        if self._blocks[index].activation is None:
            self.settle()

    def activated(self, index: int, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Take the output of the model's own activation, if its input was the values of this block."""
        # The model's result for these values need not be computed again. Results for other values do not matter.
        if self._pending is not None and self._pending[0] == index and _same(self._pending[1], inputs):
            self._pending = None
            self.hand_over(index, output)

    def settle(self) -> None:
        """Activate the pending values that the model did not activate."""
        if self._pending is not None:
            index, values = self._pending
            self._pending = None
            self.hand_over(index, self._blocks[index].rule.signal(values))

    def hand_over(self, index: int, signal: torch.Tensor) -> None:
        """Hand over the signal of a block without padding."""
        # Some models run their FFNs on [tokens, hidden], some on [sequences, width, hidden]: the order is the same.
        rows = signal.detach().reshape(-1, self._blocks[index].neurons)
        self._receive(index, rows if self._kept is None else rows.index_select(0, self._kept), None)

    def routed(self, index: int, run: ExpertRun) -> None:
        """Hand over the signal of an expert on the tokens routed to it.

        Raises:
            UnsupportedError: The expert has run before, or has another number of neurons.
        """
        block = self._blocks[index]
        tokens, values = run.tokens, run.product if block.before else run.gate
        if index in self._seen:
            raise UnsupportedError(f"block {block.rule.block!r} runs more than once on a batch")
        if values.shape[-1] != block.neurons:
            raise UnsupportedError(
                f"block {block.rule.block!r} has {values.shape[-1]} neurons in the model, and {block.neurons} as "
                "described",
                fix="correct `neuron_axis`, or what the experts share tensors with (docs/architectures.md)",
            )
        self._seen.add(index)
        if self._mask is not None:
            kept = self._mask[tokens]
            tokens, values = (self._mask.cumsum(0) - 1)[tokens[kept]], values[kept]
        if tokens.numel():
            self._receive(index, block.rule.signal(values.detach()), tokens)


def _same(values: torch.Tensor, inputs: tuple[Any, ...]) -> bool:
    """Whether a module's only input is these values, at the same place in memory."""
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        return False
    found, wanted = ((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (inputs[0], values))
    return found == wanted


def record(
    model: HookedModel,
    thresholds: Sequence[float],
    batches: Iterable[ModelBatch],
    spool: Spool,
    advance: Advance,
    sources: Sequence[int],
    before: int = 0,
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Run the batches and spool the bits of every block.

    Args:
        sources: The source that each batch is of, those of one source together.
        before: The tokens of the trace that come before these batches.

    Returns:
        How many bits each block has set; and of each source how many are set, and how many bits there are.

    Raises:
        InputError: A signal is NaN.
    """
    active = [0] * len(model.blocks)
    counts: dict[int, list[int]] = {}
    received: list[tuple[int, FiredBits, torch.Tensor | None]] = []

    def receive(index: int, signal: torch.Tensor, tokens: torch.Tensor | None) -> None:
        received.append((index, pack_fired(signal, thresholds[index]), tokens))

    for batch, source in zip(batches, sources, strict=True):
        model.run(batch, receive)
        of_source = counts.setdefault(source, [0, 0])
        # Only now, so that we wait for the device once per batch and not for every block.
        for index, fired, tokens in received:
            if not fired.is_number:
                raise not_a_number(model.blocks[index].rule.block)
            active[index] += int(fired.active)
            of_source[0] += int(fired.active)
            of_source[1] += model.blocks[index].neurons * (batch.tokens if tokens is None else int(tokens.numel()))
            spool.append(index, fired.rows())
            if tokens is not None:
                spool.append_tokens(index, (tokens + before).to(torch.int32).cpu().numpy())
        received.clear()
        before += batch.tokens
        advance(batch.tokens)
    return active, {source: (fired, bits) for source, (fired, bits) in counts.items()}


def calibrate(
    model: HookedModel,
    batches: Iterable[ModelBatch],
    advance: Advance,
) -> BlockHistograms:
    """Run the batches and count the magnitudes of the signal of every block.

    Raises:
        InputError: A signal is NaN.
    """
    histograms = [MagnitudeHistogram() for _ in model.blocks]
    of_modules = {id(block.module): MagnitudeHistogram() for block in model.blocks if block.expert is not None}
    layers = [of_modules.get(id(block.module)) if block.expert is not None else None for block in model.blocks]

    def receive(index: int, signal: torch.Tensor, _tokens: torch.Tensor | None) -> None:
        block = model.blocks[index]
        magnitude = signal.abs()
        require_numbers(block.rule.block, magnitude)
        counts = magnitude_counts(magnitude)
        histograms[index].add(counts)
        if (layer := layers[index]) is not None:
            layer.add(counts)

    for batch in batches:
        model.run(batch, receive)
        advance(batch.tokens)
    return BlockHistograms(histograms, layers, [block.neurons for block in model.blocks])
