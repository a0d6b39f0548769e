"""Which tensors outside the FFN blocks are matrices that may be rounded: attention, embeddings, the output head."""

from __future__ import annotations

from collections.abc import Sequence

from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, CONVERTIBLE_DTYPES

# Parts of names, between dots, of small matrices that decide much: what routes tokens to experts, or gates them.
_ROUTERS = ("gate", "router", "shared_expert_gate", "gating")
# Words in the parts of names of what is no matrix, however it is stored.
_NOT_MATRICES = ("norm", "bias")


def may_be_rounded(name: str, dtype: str, shape: Sequence[int], weight_format: str) -> bool:
    """Whether a tensor that is part of no block is a matrix whose rows can be stored in a format of blocks.

    It is if it has two dimensions, rows of whole blocks, a dtype of `CONVERTIBLE_DTYPES`, a name that ends in
    `weight`, and no part of the name is that of a router, or holds `norm` or `bias`.
    """
    parts = name.lower().split(".")
    return (
        parts[-1] == "weight"
        and len(shape) == 2
        and shape[0] > 0
        and shape[1] > 0
        and shape[1] % BLOCK_FORMATS[weight_format].block_weights == 0
        and dtype in CONVERTIBLE_DTYPES
        and not any(part in _ROUTERS or any(word in part for word in _NOT_MATRICES) for part in parts)
    )
