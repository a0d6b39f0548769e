"""Hooks on the FFN blocks of a running model, and what is made of their signals: recorded bits or thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuralink_cli.activations.firing import FiringRule, magnitude_counts, pack_bits
from neuralink_cli.activations.hf_packages import first_line
from neuralink_cli.activations.spool import Spool
from neuralink_cli.activations.threshold import MagnitudeHistogram
from neuralink_cli.errors import InputError, UnsupportedError

BatchArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class HookedBlock:
    """Where the firing signal of a block is seen: the output of `module`, or what goes into it."""

    module: Any
    before: bool
    neurons: int
    rule: FiringRule


class HookedModel:
    """A model that hands over what its FFN blocks compute. The hooks are there while its context is entered."""

    def __init__(self, model: Any, blocks: Sequence[HookedBlock]) -> None:
        self._model = model
        self.blocks = blocks
        self._hooks = ExitStack()
        self._receive: Callable[[int, torch.Tensor], None] = lambda _index, _values: None
        self._mask: torch.Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._seen: set[int] = set()

    def __enter__(self) -> HookedModel:
        for index, block in enumerate(self.blocks):
            if block.before:
                handle = block.module.register_forward_pre_hook(self._before(index))
            else:
                handle = block.module.register_forward_hook(self._after(index))
            self._hooks.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def run(self, batch: BatchArrays, receive: Callable[[int, torch.Tensor], None]) -> None:
        """Run a batch of token ids and their mask, both `[sequences, width]`, through the model.

        Args:
            receive: Called once per block, in the order in which the model runs them, with the block's index and its
                values `[tokens, neurons]`: those of padding are left out, the others in the order of the sequences.

        Raises:
            InputError: Not enough memory on the device.
            UnsupportedError: A block did not run exactly once on every token.
        """
        device = self._model.device
        ids, mask = (torch.from_numpy(array).to(device) for array in batch)
        padded = not batch[1].all()
        self._receive, self._shape, self._mask = receive, tuple(ids.shape), mask.reshape(-1) if padded else None
        self._seen.clear()
        inputs = {"input_ids": ids, **({"attention_mask": mask.long()} if padded else {})}
        try:
            with torch.inference_mode():
                self._model(**inputs)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"the device has not enough memory ({first_line(error)})",
                fix="lower --batch-size or --max-seq-length, or use --device cpu",
            ) from None
        for index, block in enumerate(self.blocks):
            if index not in self._seen:
                raise UnsupportedError(f"the model did not run block {block.rule.block!r}")

    def _before(self, index: int) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _module, inputs: self._hand_over(index, inputs[0])

    def _after(self, index: int) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _inputs, output: self._hand_over(index, output)

    def _hand_over(self, index: int, values: torch.Tensor) -> None:
        block = self.blocks[index]
        tokens = self._shape[0] * self._shape[1]
        if index in self._seen or values.shape[-1] != block.neurons or values.numel() != tokens * block.neurons:
            raise UnsupportedError(
                f"block {block.rule.block!r} does not run once on all tokens (it sees {list(values.shape)}, "
                f"the tokens are {list(self._shape)} and its neurons {block.neurons})"
            )
        self._seen.add(index)
        # Some models run their FFNs on [tokens, hidden], some on [sequences, width, hidden]: the order is the same.
        rows = values.detach().reshape(tokens, block.neurons)
        self._receive(index, rows if self._mask is None else rows[self._mask])


def record(
    model: HookedModel,
    thresholds: Sequence[float],
    batches: Iterable[BatchArrays],
    spool: Spool,
    advance: Advance,
) -> list[int]:
    """Run the batches, spool the bits of every block, and return how many bits each block has set.

    Raises:
        InputError: A signal is not a number.
    """
    active = [0] * len(model.blocks)

    def receive(index: int, values: torch.Tensor) -> None:
        fired = model.blocks[index].rule.fires(values, thresholds[index])
        active[index] += int(torch.count_nonzero(fired))
        spool.append(index, pack_bits(fired))

    for batch in batches:
        model.run(batch, receive)
        advance(int(batch[1].sum()))
    return active


def calibrate(
    model: HookedModel,
    batches: Iterable[BatchArrays],
    active_ratio: float,
    advance: Advance,
) -> list[float]:
    """Run the batches and return the threshold of each block at which its neurons fire at `active_ratio`.

    Raises:
        InputError: A signal is not a number.
    """
    histograms = [MagnitudeHistogram() for _ in model.blocks]

    def receive(index: int, values: torch.Tensor) -> None:
        histograms[index].add(magnitude_counts(model.blocks[index].rule.magnitude(values)))

    for batch in batches:
        model.run(batch, receive)
        advance(int(batch[1].sum()))
    return [histogram.threshold(active_ratio) for histogram in histograms]
