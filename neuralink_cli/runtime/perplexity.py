"""How well a causal language model predicts a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from neuralink_cli.calibration.sequences import TokenIds
from neuralink_cli.models.model_errors import (
    explained_model_errors,
    has_choices,
    no_numbers,
    require_known_tokens,
    vocabulary_of,
)
from neuralink_cli.models.offload import input_device
from neuralink_cli.runtime.likelihood import Perplexity, perplexity_of

# Tokens whose losses are computed at a time.
_AT_ONCE = 64


def perplexity(
    model: Any, sequences: Sequence[TokenIds], progress: Callable[[int], object] | None = None
) -> Perplexity | None:
    """The perplexity of token sequences, each on its own; None if no sequence has two tokens.

    Args:
        progress: Called with the tokens done since the last call.
    """
    total, count = 0.0, 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.astype(np.int64))[None].to(input_device(model))
        if ids.shape[1] > 1:
            require_known_tokens(sequence, vocabulary_of(model), "the text to measure perplexity on")
            with explained_model_errors(model), torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            if not has_choices(logits):
                raise no_numbers("the text to measure perplexity on", dtype=True)
            # The vocabulary is wide: as few copies of it as possible.
            for some, targets in zip(logits.split(_AT_ONCE), ids[0, 1:].split(_AT_ONCE), strict=True):
                total += float(torch.nn.functional.cross_entropy(some.float(), targets, reduction="sum"))
            count += ids.shape[1] - 1
        if progress is not None:
            progress(ids.shape[1])
    return perplexity_of(total, count)
