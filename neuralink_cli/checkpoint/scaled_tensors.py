"""Weights of at most eight bits that are numbers together with the scales of their blocks, in checkpoints that say so.

Three kinds: FP8 with block scales, as DeepSeek and Qwen publish (`weight_scale_inv`), the int8, FP8 and packed
weights of compressed-tensors (`weight_scale`), and the MXFP4 of gpt-oss (`mxfp4_stacks.py`). A weight is its code times
the scale of its block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.errors import UnsupportedError

# Dtype and shape of a tensor.
Shape = tuple[str, tuple[int, ...]]

# 32 codes of 4 bits, which are floating point, and a scale, a power of two whose exponent is a byte.
MXFP4_PACKED = "mxfp4-pack-quantized"

_CODES = frozenset({"F8_E4M3", "I8"})
_SCALES = frozenset({"F32", "F16", "BF16"})
# What the scale of `x.weight` is called.
_FP8_SCALE, _COMPRESSED_SCALE = "weight_scale_inv", "weight_scale"
# Formats of compressed-tensors whose codes are bytes, or packed ones that stand for bytes (see `packed_tensors.py`).
_COMPRESSED_FORMATS = frozenset({"int-quantized", "float-quantized", "naive-quantized", "pack-quantized", MXFP4_PACKED})
# What tensors beside a weight would mean, by the last step of their names.
_STRANGERS = {
    "weight_zero_point": "holds zero points: only symmetric weights are understood",
    "weight_g_idx": "says which group a column is in (activation order), which is not understood",
}
_FP8_BLOCK = (128, 128)
# Weights that share a scale in MXFP4.
MX_BLOCK = 32
WAY_OUT = "lay out the unquantised checkpoint (--layout permuted) and quantise the result"


@dataclass(frozen=True)
class ScaledTensor:
    """A matrix of codes `[rows, columns]` and where its scales are: one for `block_rows` x `block_columns` weights.

    `stacked` is how many matrices its rows are those of, one after the other, if it is a stack of MXFP4; else 0.
    """

    name: str
    scales: str
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    stacked: int = 0


def is_stacked_mxfp4(quantization: Any) -> bool:
    """Whether a config speaks of MXFP4 as gpt-oss has it."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def may_have_scales(quantization: Any) -> bool:
    """Whether what a config says of quantisation is of a kind whose scales are understood here."""
    if not isinstance(quantization, Mapping):
        return False
    if quantization.get("quant_method") == "fp8" or is_stacked_mxfp4(quantization):
        return True
    groups = [kind for kind, _ in stated_groups(quantization)]
    return bool(groups) and set(groups) <= _COMPRESSED_FORMATS


def stated_groups(quantization: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The groups of modules of a config of compressed-tensors: the format of each, and what it says of the weights."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compressed-tensors":
        return
    whole = quantization.get("format")
    groups = quantization.get("config_groups")
    stated = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    for group in stated or [{}]:
        weights = group.get("weights")
        yield str(group.get("format") or whole), weights if isinstance(weights, Mapping) else {}


def find_scaled_tensors(
    quantization: Any, tensors: Mapping[str, Shape], where: Path, understood: Collection[str] = ()
) -> dict[str, ScaledTensor]:
    """The weights that have scales, by name; none if the config says nothing of quantisation that is understood here.

    Those of stacks of MXFP4 are found by `find_stacks`.

    Args:
        quantization: The `quantization_config` of the config.
        tensors: Those of the checkpoint, with packed codes as they would be unpacked.
        understood: Other tensors that belong to quantised weights, which others understand.

    Raises:
        UnsupportedError: Scales of another shape or dtype than is understood here, codes without scales, or other
            tensors beside them that belong to their weights.
    """
    if not may_have_scales(quantization) or is_stacked_mxfp4(quantization):
        return {}
    fp8 = quantization["quant_method"] == "fp8"
    ending = _FP8_SCALE if fp8 else _COMPRESSED_SCALE
    block = _block_of(quantization) if fp8 else None
    exponents = any(kind == MXFP4_PACKED for kind, _ in stated_groups(quantization))
    found = {}
    for name, (dtype, shape) in tensors.items():
        scales = f"{name.removesuffix('weight')}{ending}"
        if not name.endswith(".weight") or (dtype not in _CODES and scales not in tensors):
            continue
        if scales not in tensors:
            raise UnsupportedError(f"tensor {name!r} is {dtype}, but has no scales", where=where, fix=WAY_OUT)
        scale_dtype, scale_shape = tensors[scales]
        size = _block_size(shape, scale_shape, block)
        as_scales = scale_dtype in _SCALES or (exponents and scale_dtype == "U8" and size == (1, MX_BLOCK))
        if dtype not in _CODES or not as_scales or size is None:
            raise UnsupportedError(
                f"tensor {name!r} is {dtype} {list(shape)} with scales {scale_dtype} {list(scale_shape)}, which is "
                "not understood",
                where=where,
                fix=WAY_OUT,
            )
        found[name] = ScaledTensor(name, scales, shape[0], shape[1], *size)
    known = {tensor.scales for tensor in found.values()} | set(understood)
    for name in tensors:
        # Without which the scales may mean something else.
        if name not in known and _weight_of(name) in found:
            what = _STRANGERS.get(name.rpartition(".")[2], "belongs to quantised weights, and is not understood")
            raise UnsupportedError(f"tensor {name!r} {what}", where=where, fix=WAY_OUT)
    return found


def _weight_of(name: str) -> str:
    """The weight that a tensor like `x.weight_g_idx` belongs to by its name."""
    module, _, last = name.rpartition(".")
    return f"{module}.weight" if last.startswith("weight_") else ""


def _block_of(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """The size of a block of FP8; a config without one means 128 x 128."""
    size = quantization.get("weight_block_size") or _FP8_BLOCK
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return _FP8_BLOCK


def _block_size(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The weights that share a scale: all, those of a block (`block`), or of a part of a row; None if nothing fits."""
    if len(shape) != 2 or not all(shape):
        return None
    if scales in ((), (1,), (1, 1)):
        return shape[0], shape[1]
    if block is not None:
        return block if scales == (-(-shape[0] // block[0]), -(-shape[1] // block[1])) else None
    if len(scales) != 2 or scales[0] != shape[0] or not scales[1] or shape[1] % scales[1]:
        return None
    return 1, shape[1] // scales[1]
