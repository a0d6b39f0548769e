"""Bytes of a safetensors file as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from neuralink_cli.arrays import Bytes
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, SOURCE
from neuralink_cli.weight_formats.quantising import dequantise

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def decode_bundles(bundles: Bytes, block: FlashBlock, dtype: torch.dtype, where: Path) -> torch.Tensor:
    """The weights `[k, parts, hidden]` of bundles, uint8 `[k, stride]`; in their memory if they are of `dtype` in it.

    Raises:
        UnsupportedError: The dtype is not supported here.
    """
    shape = (bundles.shape[0], len(block.parts), block.hidden)
    if block.bundle_dtype == block.dtype:
        return as_tensor(bundles, block.dtype, shape, where).to(dtype)
    weights = torch.empty(shape, dtype=dtype)
    for number, part in enumerate(block.parts):
        data = bundles[:, part.offset : part.offset + part.bytes]
        weights[:, number].copy_(as_weights(data, part.weights, block.dtype, block.hidden, where))
    return weights


def as_weights(data: npt.NDArray[np.uint8], weights: str, dtype: str, hidden: int, where: Path) -> torch.Tensor:
    """Weights `[k, hidden]` from their bytes, uint8 `[k, bytes]`: decoded to float32 if they are rounded.

    Args:
        weights: Their format; `source` if they are of `dtype`.

    Raises:
        UnsupportedError: The dtype is not supported here.
    """
    if weights == SOURCE:
        return as_tensor(np.ascontiguousarray(data), dtype, (data.shape[0], hidden), where)
    return torch.from_numpy(dequantise(data, BLOCK_FORMATS[weights]))


def as_tensor(data: npt.NDArray[np.uint8], dtype: str, shape: Sequence[int], where: Path) -> torch.Tensor:
    """A tensor that shares the memory of its bytes (uint8, contiguous).

    Raises:
        UnsupportedError: The dtype is not supported here.
    """
    if dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"cannot compute with tensors of dtype {dtype}", where=where)
    return torch.from_numpy(data.reshape(-1)).view(TORCH_DTYPES[dtype]).reshape(tuple(shape))
