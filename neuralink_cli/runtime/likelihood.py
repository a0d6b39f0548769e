"""What measuring perplexity gives. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` tokens, each predicted from the tokens before it."""

    value: float
    tokens: int


def perplexity_of(total: float, tokens: int) -> Perplexity | None:
    """Perplexity from the sum of the negative log-likelihoods of so many tokens; None if there are none."""
    # A mean too large for exp means that the model knows nothing; it is not a failure.
    return Perplexity(math.exp(min(total / tokens, 700.0)), tokens) if tokens else None
