"""Which neurons fire: the signal of a block, and its comparison with a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuralink_cli.activations.threshold import BIN_SHIFT, BINS
from neuralink_cli.architectures.activation_names import split_cut, split_most, swish_slope
from neuralink_cli.errors import InputError, UnsupportedError

# Only for these is out > 0 the same as act(out) > 0: they map no positive number to zero.
_POSITIVE_FIRES = frozenset({"relu", "relu6"})
# These have parameters that the name does not give.
_PARAMETRIC = frozenset({"prelu", "xielu"})


@dataclass(frozen=True)
class FiringRule:
    """How the values that a hook sees become the signal of a block: function(value), or the value itself for None."""

    block: str
    function: Any
    positive_fires: bool

    def signal(self, values: torch.Tensor) -> torch.Tensor:
        """The signal s of every neuron, with the shape and dtype of `values`."""
        signal: torch.Tensor = values if self.function is None else self.function(values)
        return signal

    def fires(self, values: torch.Tensor, threshold: float) -> torch.Tensor:
        """Whether |s| > threshold: bool `[tokens, neurons]`.

        Raises:
            InputError: The signal is NaN.
        """
        if self.positive_fires and threshold == 0.0:
            require_numbers(self.block, values)
            return values > 0
        magnitude = self.signal(values).abs()
        require_numbers(self.block, magnitude)
        # The threshold is a float32 and must not be rounded to the dtype of the model.
        return magnitude.float() > threshold


@dataclass(frozen=True)
class _Cut:
    """An activation behind a cut, computed as Gemma 3n does it."""

    share: float
    function: Any

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        share = torch.tensor(self.share, dtype=torch.float32, device=values.device)
        deviations = torch.distributions.normal.Normal(0, 1).icdf(share).type(values.dtype)
        mean = values.mean(dim=-1, keepdim=True)
        deviation = values.std(dim=-1, keepdim=True, unbiased=False)
        signal: torch.Tensor = self.function(torch.relu(values - (mean + deviation * deviations)))
        return signal


@dataclass(frozen=True)
class _Swish:
    """x * sigmoid(slope * x)."""

    slope: float

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return values * torch.sigmoid(values * self.slope)


@dataclass(frozen=True)
class _AtMost:
    """An activation of values that are clamped from above."""

    most: float
    function: Any

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        signal: torch.Tensor = self.function(values.clamp(max=self.most))
        return signal


def has_parameters(activation: str) -> bool:
    """Whether an activation has parameters in every block, so that its name does not say what it computes."""
    return activation in _PARAMETRIC


def firing_rule(block: str, activation: str, signal: str, own: Any = None) -> FiringRule:
    """The rule of a block for a signal ("gate": act of the hooked output; "intermediate": the hooked input itself).

    Args:
        own: The block's own activation module, for one that has parameters.

    Raises:
        UnsupportedError: There is no such activation, or it is not a function of the value alone.
    """
    if signal == "intermediate":
        return FiringRule(block, None, False)

    share, behind = split_cut(activation)
    if share and (function := _function(behind)) is not None:
        return FiringRule(block, _Cut(share, function), False)
    if has_parameters(activation) and own is not None:
        return FiringRule(block, own, False)
    most, behind = split_most(activation)
    function = _function(behind)
    if function is None:
        raise UnsupportedError(
            f"activation {activation!r} of block {block!r} is not a function that transformers knows by name",
            fix="try --signal intermediate",
        )
    # A clamp to a number above 0 does not change what is positive.
    return FiringRule(block, function if most is None else _AtMost(most, function), behind in _POSITIVE_FIRES)


def _function(activation: str) -> Any:
    """An activation by its name; None if it is not known, or if the name does not say all."""
    from transformers.activations import ACT2FN

    slope = swish_slope(activation)
    if slope is not None:
        return _Swish(slope)
    return None if activation not in ACT2FN or has_parameters(activation) else ACT2FN[activation]


def require_numbers(block: str, values: torch.Tensor) -> None:
    """Check that no value of a block's signal is NaN.

    Raises:
        InputError: A value is NaN.
    """
    # The maximum of values with a NaN is NaN, and takes one pass without a copy.
    if values.numel() and bool(torch.isnan(values.amax())):
        raise not_a_number(block)


def not_a_number(block: str) -> InputError:
    """The error for a block whose signal is NaN somewhere."""
    return InputError(
        f"the firing signal of block {block!r} is not a number (NaN)",
        fix="check the checkpoint's weights, or use a wider --dtype",
    )


def magnitude_counts(magnitude: torch.Tensor) -> npt.NDArray[np.int64]:
    """How many values fall into each bin of a `MagnitudeHistogram`: int64 `[BINS]`."""
    bins = magnitude.float().contiguous().view(torch.int32) >> BIN_SHIFT
    counts: npt.NDArray[np.int64] = torch.bincount(bins.reshape(-1), minlength=BINS).cpu().numpy()
    return counts
