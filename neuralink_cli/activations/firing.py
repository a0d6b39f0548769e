"""Which neurons fire: the signal of a block, held against its threshold, as packed bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuralink_cli.activations.threshold import BIN_SHIFT, BINS
from neuralink_cli.activations.trace import Bits
from neuralink_cli.errors import InputError, UnsupportedError

# For these alone out > 0 is the same as act(out) > 0: they map no positive number to zero.
_POSITIVE_FIRES = frozenset({"relu", "relu6"})
# These have parameters of their own, which a name does not give.
_PARAMETRIC = frozenset({"prelu", "xielu"})


@dataclass(frozen=True)
class FiringRule:
    """How the values that a hook sees become the signal of a block: function(value), None standing for the identity."""

    block: str
    function: Any
    positive_fires: bool

    def magnitude(self, values: torch.Tensor) -> torch.Tensor:
        """|s| of every neuron, float `[tokens, neurons]`.

        Raises:
            InputError: The signal is not a number.
        """
        magnitude = (values if self.function is None else self.function(values)).abs()
        self._require_numbers(magnitude)
        return magnitude

    def fires(self, values: torch.Tensor, threshold: float) -> torch.Tensor:
        """Whether |s| > threshold: bool `[tokens, neurons]`.

        Raises:
            InputError: The signal is not a number.
        """
        if self.positive_fires and threshold == 0.0:
            self._require_numbers(values)
            return values > 0
        # The threshold is a float32: it must not be rounded to the dtype of the model.
        return self.magnitude(values).float() > threshold

    def _require_numbers(self, values: torch.Tensor) -> None:
        # The maximum of anything with a NaN in it is NaN, and is found in one pass without a copy.
        if values.numel() and bool(torch.isnan(values.amax())):
            raise InputError(
                f"the firing signal of block {self.block!r} is not a number (NaN)",
                fix="check the checkpoint's weights, or use a wider --dtype",
            )


def firing_rule(block: str, activation: str, signal: str) -> FiringRule:
    """The rule of a block for a signal ("gate": act of the hooked output; "intermediate": the hooked input itself).

    Raises:
        UnsupportedError: transformers has no such activation, or it is not a function of the value alone.
    """
    if signal == "intermediate":
        return FiringRule(block, None, False)
    from transformers.activations import ACT2FN

    if activation not in ACT2FN or activation in _PARAMETRIC:
        raise UnsupportedError(
            f"activation {activation!r} of block {block!r} is not a function that transformers knows by its name",
            fix="try --signal intermediate",
        )
    return FiringRule(block, ACT2FN[activation], activation in _POSITIVE_FIRES)


def pack_bits(fired: torch.Tensor) -> Bits:
    """Bool `[tokens, neurons]` as uint8 `[tokens, ceil(neurons / 8)]`: bit j % 8 of byte j // 8 is neuron j."""
    if fired.device.type == "cpu":
        return np.packbits(fired.numpy(), axis=1, bitorder="little")
    bits: Bits = pack_bits_on_device(fired).cpu().numpy()
    return bits


def pack_bits_on_device(fired: torch.Tensor) -> torch.Tensor:
    """As `pack_bits`, where the data is, so that an eighth of it travels."""
    padded = torch.nn.functional.pad(fired.to(torch.uint8), (0, -fired.shape[1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=fired.device)
    return (padded.reshape(fired.shape[0], -1, 8) * weights).sum(dim=2, dtype=torch.uint8)


def magnitude_counts(magnitude: torch.Tensor) -> npt.NDArray[np.int64]:
    """How many values fall into each bin of a `MagnitudeHistogram`: int64 `[BINS]`."""
    bins = magnitude.float().contiguous().view(torch.int32) >> BIN_SHIFT
    counts: npt.NDArray[np.int64] = torch.bincount(bins.reshape(-1), minlength=BINS).cpu().numpy()
    return counts
