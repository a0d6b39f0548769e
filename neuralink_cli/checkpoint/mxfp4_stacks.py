"""MXFP4 as gpt-oss has it: the matrices of all experts of a layer in one tensor, their scales in another.

`x_blocks` is U8 `[experts, rows, columns / 32, 16]`, `x_scales` U8 `[experts, rows, columns / 32]`. Everything else
sees `x_blocks` as I8 `[experts, rows, columns]`, a byte for each code. transformers turns the matrices around as it
decodes them: its weight is `x`, `[experts, columns, rows]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.scaled_tensors import MX_BLOCK, WAY_OUT, ScaledTensor, Shape, is_stacked_mxfp4
from neuralink_cli.errors import UnsupportedError

_BLOCKS, _SCALES = "_blocks", "_scales"


def may_be_stack(name: str) -> bool:
    """Whether a tensor may hold the codes of a stack."""
    return name.endswith(_BLOCKS)


def decoded_name(name: str) -> str:
    """What transformers calls the numbers of a stack."""
    return name.removesuffix(_BLOCKS)


def find_stacks(quantization: Any, tensors: Mapping[str, Shape], where: Path) -> dict[str, ScaledTensor]:
    """The stacks of a checkpoint by the name of their codes, as one matrix of all rows; none if its config has none.

    Args:
        quantization: The `quantization_config` of the config.
        tensors: As they are stored.

    Raises:
        UnsupportedError: Codes without scales, or of another shape than is understood here.
    """
    if not is_stacked_mxfp4(quantization):
        return {}
    found = {}
    for name, (dtype, shape) in tensors.items():
        scales = name.removesuffix(_BLOCKS) + _SCALES
        if not name.endswith(_BLOCKS):
            continue
        if scales not in tensors:
            raise UnsupportedError(f"tensor {name!r} is {dtype}, but has no scales", where=where, fix=WAY_OUT)
        whole = dtype == "U8" and len(shape) == 4 and all(shape) and shape[3] * 2 == MX_BLOCK
        if not whole or tensors[scales] != ("U8", shape[:3]):
            kind, size = tensors[scales]
            raise UnsupportedError(
                f"tensor {name!r} is {dtype} {list(shape)} with scales {kind} {list(size)}, not understood as MXFP4",
                where=where,
                fix=WAY_OUT,
            )
        found[name] = ScaledTensor(name, scales, shape[0] * shape[1], shape[2] * MX_BLOCK, 1, MX_BLOCK, shape[0])
    return found
