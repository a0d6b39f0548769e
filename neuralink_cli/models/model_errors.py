"""What a model's own code raises, while it is loaded or run, is a fault of the model or of what it got: bad input."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError, NeuralinkError, first_line

_PACKAGE = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def explained_model_errors(model: Any) -> Iterator[None]:
    """Within the block a model runs: its exceptions are told as what they are, with the place that raised them.

    Raises:
        InputError: Its code, or that of transformers below it, raised something.
    """
    try:
        yield
    except (NeuralinkError, MemoryError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if _is_out_of_memory(error) or Path(frame.filename).is_relative_to(_PACKAGE):
            # Ours is a bug of ours.
            raise
        place = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
        raise InputError(
            f"{type(model).__name__} of transformers fails when it runs: {first_line(error)} ({place})",
            where=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
            fix="check config.json against the weights, and that the model takes such input alone",
        ) from error


def require_known_tokens(ids: Any, vocabulary: int, where: Any) -> None:
    """Check that a model has an embedding for every token id.

    Args:
        ids: A numpy array or sequence of token ids, not empty.
        where: The text that they are of.

    Raises:
        InputError: It lacks one.
    """
    largest = int(max(ids))
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer turns it into token {largest}, but the model has only {vocabulary}",
            where=where,
            fix="use the tokenizer that belongs to the model",
        )


def no_numbers(where: Any, *, dtype: bool = False) -> InputError:
    """The error for a model whose outputs are NaN or infinite: there is nothing to compare or to choose from.

    Args:
        dtype: Whether the user may have chosen the dtype that it computes in.
    """
    return InputError(
        "the model's outputs are not numbers (NaN or infinite)",
        where=where,
        fix="check its weights, also those outside FFN blocks" + (", or use a wider --dtype" if dtype else ""),
    )


def has_choices(logits: Any) -> bool:
    """Whether a model's logits, a torch tensor, tell what is likeliest. Minus infinity excludes a token."""
    # The maximum of values with a NaN is NaN.
    return math.isfinite(float(logits.amax()))


def vocabulary_of(model: Any) -> int:
    """How many token ids a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"
