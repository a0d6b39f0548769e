"""Bytes of a safetensors file as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from neuralink_cli.errors import UnsupportedError
from neuralink_cli.layout.dense_rounding import decoded_rows
from neuralink_cli.layout.plan import DenseTensor
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, SOURCE
from neuralink_cli.weight_formats.quantising import dequantise

_DTYPES = {
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


def as_dense(data: npt.NDArray[np.uint8], tensor: DenseTensor) -> torch.Tensor:
    """A tensor outside the blocks, decoded from its bytes to float32 `[rows, columns]`."""
    return torch.from_numpy(decoded_rows(tensor, data))


def as_tensor(data: npt.NDArray[np.uint8], dtype: str, shape: Sequence[int], where: Path) -> torch.Tensor:
    """A tensor that shares the memory of its bytes (uint8, contiguous).

    Raises:
        UnsupportedError: The dtype is not supported here.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError(f"cannot compute with tensors of dtype {dtype}", where=where)
    return torch.from_numpy(data.reshape(-1)).view(_DTYPES[dtype]).reshape(tuple(shape))
