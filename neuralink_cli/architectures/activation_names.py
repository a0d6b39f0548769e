"""Names of activations: those that transformers knows, and those behind a cut.

`gaussian_topk(0.95) gelu_pytorch_tanh` (Gemma 3n) lets only those neurons of a token through whose gate is above what
95 % of a normal distribution with the mean and deviation of all its gates lie below. It activates by how much.
"""

from __future__ import annotations

import re

_CUT = re.compile(r"gaussian_topk\((0\.[0-9]+)\) (.+)")


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
