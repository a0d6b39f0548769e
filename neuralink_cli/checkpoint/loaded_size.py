"""How much memory the weights of a checkpoint take once they are loaded, from its headers."""

from __future__ import annotations

import re
from math import prod

from neuralink_cli.checkpoint.checkpoint import Checkpoint

# Bytes per value of the dtypes that models run in.
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What computes logits from the last hidden states.
_HEADS = ("lm_head.", "embed_out.")
_STORED_AS = {"float32": ("F32",), "bfloat16": ("BF16",), "float16": ("F16",), "auto": ("F32", "BF16", "F16")}
_OF_ONE_EXPERT = re.compile(r"\bexperts\.[0-9]+\.")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})


def loaded_bytes(checkpoint: Checkpoint, dtype: str, *, with_head: bool = True) -> int:
    """Bytes that the weights of a checkpoint take in a dtype; "auto" is their own dtype.

    Args:
        with_head: Whether the head that computes logits is loaded too.
    """
    total = 0
    for place in checkpoint.tensors.values():
        entry = place.entry
        if entry.name.startswith(_HEADS) and not with_head:
            continue
        if entry.name in checkpoint.scaled:
            # transformers makes numbers of codes and scales as it loads them.
            total += prod(entry.shape) * FLOAT_BYTES.get(dtype, 2)
        else:
            widened = dtype != "auto" and entry.dtype in _FLOATS
            total += prod(entry.shape) * FLOAT_BYTES[dtype] if widened else entry.nbytes
    return total


def mapped_bytes(checkpoint: Checkpoint, dtype: str, *, with_head: bool = True) -> int:
    """Bytes of the files that are in memory beside the weights until all are loaded: of what is not stored in a dtype.

    transformers maps the files and makes other weights from what it finds. Weights of the dtype stay where they are,
    but for those of single experts, which it puts together.
    """
    return sum(
        entry.nbytes
        for file in checkpoint.files
        for entry in file.header.entries
        if (entry.dtype not in _STORED_AS[dtype] or _OF_ONE_EXPERT.search(entry.name))
        and (with_head or not entry.name.startswith(_HEADS))
    )


def expert_tensors(checkpoint: Checkpoint) -> int:
    """How many tensors hold weights of a single expert."""
    return sum(_OF_ONE_EXPERT.search(name) is not None for name in checkpoint.tensors)
