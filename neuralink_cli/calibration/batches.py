"""The batches that a model runs: the arguments of its forward function, and the mask of tokens that are not padding."""

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
    """Arguments of the forward function, and a mask `[sequences, width]`, false where padding is."""

    inputs: Mapping[str, npt.NDArray[Any]]
    mask: Mask

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        return int(np.count_nonzero(self.mask))


# Token ids `[sequences, width]`, padded on the right, and their mask.
TextBatch = Callable[[Ids, Mask], ModelBatch]


def text_batch(ids: Ids, mask: Mask) -> ModelBatch:
    """A batch of texts."""
    inputs = {"input_ids": ids}
    if not mask.all():
        inputs["attention_mask"] = mask.astype(np.int64)
    return ModelBatch(inputs, mask)


def encoder_decoder_batch(start: int) -> TextBatch:
    """Batches of an encoder-decoder model: the decoder reads the same text, shifted right by one token.

    Args:
        start: The decoder's start token.
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
    """A batch of images, float32 `[images, channels, height, width]`, each of which becomes `tokens` tokens."""
    return ModelBatch({"pixel_values": pixels}, np.ones((pixels.shape[0], tokens), dtype=bool))
