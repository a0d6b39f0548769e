"""What goes into a model at once, as its forward function names it, and where the tokens are that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ModelBatch:
    """Arguments of the forward function, and a mask `[sequences, width]`, true where tokens are and not padding."""

    inputs: Mapping[str, npt.NDArray[Any]]
    mask: Mask

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(np.count_nonzero(self.mask))


# Token ids `[sequences, width]`, padded on the right, and their mask.
TextBatch = Callable[[Ids, Mask], ModelBatch]


def text_batch(ids: Ids, mask: Mask) -> ModelBatch:
    """A batch of a model that reads a text."""
    inputs = {"input_ids": ids}
    if not mask.all():
        inputs["attention_mask"] = mask.astype(np.int64)
    return ModelBatch(inputs, mask)


def encoder_decoder_batch(start: int) -> TextBatch:
    """Batches of a model that reads a text and writes another: the same, each token after the one before it.

    Args:
        start: The token that a decoder starts from.
    """

    def batch(ids: Ids, mask: Mask) -> ModelBatch:
        shifted = np.concatenate([np.full_like(ids[:, :1], start), ids[:, :-1]], axis=1)
        inputs = dict(text_batch(ids, mask).inputs)
        inputs["decoder_input_ids"] = shifted
        if "attention_mask" in inputs:
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
        return ModelBatch(inputs, mask)

    return batch


def image_batch(pixels: npt.NDArray[np.float32], tokens: int) -> ModelBatch:
    """A batch of images, float32 `[images, channels, height, width]`, that a model makes so many tokens of each."""
    return ModelBatch({"pixel_values": pixels}, np.ones((pixels.shape[0], tokens), dtype=bool))
