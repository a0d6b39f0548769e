"""Names of activations: those that transformers knows, those behind a cut or a clamp, and those with a slope.

`gaussian_topk(0.95) gelu_pytorch_tanh` (Gemma 3n) lets only those neurons of a token through whose gate is above what
95 % of a normal distribution with the mean and deviation of all its gates lie below. It activates by how much.

`at_most(7) swish(1.702)` (gpt-oss) is x * sigmoid(1.702 * x) of what the gate gives, or of 7 if that is less.
"""

from __future__ import annotations

import re

_CUT = re.compile(r"gaussian_topk\((0\.[0-9]+)\) (.+)")
_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
_MOST = re.compile(rf"at_most\({_NUMBER}\) (.+)")
_SWISH = re.compile(rf"swish\({_NUMBER}\)")


def with_cut(name: str, share: float) -> str:
    """The name of an activation behind a cut of the lowest `share` of the neurons; as it is if nothing is cut.

    Raises:
        ValueError: The share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"{share} is no share of neurons below 1")
    return f"gaussian_topk({share:.6f}".rstrip("0") + f") {name}" if share else name


def split_cut(name: str) -> tuple[float, str]:
    """The share of neurons that is cut, 0 if none is, and the activation behind the cut."""
    found = _CUT.fullmatch(name)
    return (float(found[1]), found[2]) if found else (0.0, name)


def swish(slope: float) -> str:
    """The name of x * sigmoid(slope * x)."""
    return f"swish({slope:.12g})"


def swish_slope(name: str) -> float | None:
    """The slope of such an activation; None for another."""
    found = _SWISH.fullmatch(name)
    return float(found[1]) if found else None


def with_most(name: str, most: float) -> str:
    """The name of an activation of values that are clamped to `most` from above."""
    return f"at_most({most:.12g}) {name}"


def split_most(name: str) -> tuple[float | None, str]:
    """What values are clamped to from above before the activation, None if they are not, and the activation."""
    found = _MOST.fullmatch(name)
    return (float(found[1]), found[2]) if found else (None, name)
