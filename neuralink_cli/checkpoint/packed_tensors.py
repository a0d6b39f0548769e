"""Weights whose codes are packed into words of 32 bits: `pack-quantized` of compressed-tensors, 4 or 8 bits a code.

A checkpoint holds `x.weight_packed`, I32 `[rows, columns * bits / 32]`, and `x.weight_shape`, the numbers of rows and
columns, in place of `x.weight`. Everything else sees them as they would be unpacked: a tensor `x.weight`, I8
`[rows, columns]`. Only who reads bytes of it has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuralink_cli.arrays import Bytes
from neuralink_cli.checkpoint.scaled_tensors import WAY_OUT, Shape, stated_groups
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import TensorEntry

PACKED = "weight_packed"
_FORMAT = "pack-quantized"
_SHAPE = "weight_shape"
_SHAPE_DTYPES = {"I64": "<i8", "I32": "<i4"}
_WORD_BITS = 32
_BITS = (4, 8)


@dataclass(frozen=True)
class PackedTensor:
    """The codes of a matrix `[rows, columns]`, in the order of its weights, those of `bits` bits one after the other.

    Attributes:
        name: What the matrix is called, `x.weight`.
        stored: The tensor with the codes, whose rows are whole words.
        shape: The tensor that holds rows and columns.
        bits: 4 or 8. The first code of a byte is in its low bits; a code is the number that is meant plus half of what
            `bits` bits can count.
    """

    name: str
    stored: str
    shape: str
    rows: int
    columns: int
    bits: int


def find_packed_tensors(
    quantization: Any, tensors: Mapping[str, Shape], read: Callable[[str], Bytes], where: Path
) -> dict[str, PackedTensor]:
    """The packed weights, by the name of the matrix; none if the config does not speak of any.

    Args:
        quantization: The `quantization_config` of the config.
        read: Gives the bytes of a tensor.

    Raises:
        UnsupportedError: Weights that are not symmetric, or packed in another way than is understood here.
    """
    groups = [weights for kind, weights in stated_groups(quantization) if kind == _FORMAT]
    if not groups:
        return {}
    if any(weights.get("symmetric") is False for weights in groups):
        raise UnsupportedError(
            "is quantised with zero points: of packed weights only symmetric ones are understood",
            where=where,
            fix=WAY_OUT,
        )
    allowed = [weights["num_bits"] for weights in groups if "num_bits" in weights] or [*_BITS]
    found = {}
    for stored in tensors:
        module, _, last = stored.rpartition(".")
        if last == PACKED:
            name, shape = f"{module}.weight", f"{module}.{_SHAPE}"
            size = _size(tensors[stored], shape, tensors, read, allowed)
            if size is None or name in tensors:
                kind, words = tensors[stored]
                raise UnsupportedError(
                    f"tensor {stored!r} is {kind} {list(words)}, with {_SHAPE} not understood as codes of 4 or 8 bits "
                    "that fill whole words",
                    where=where,
                    fix=WAY_OUT,
                )
            found[name] = PackedTensor(name, stored, shape, *size)
    return found


def as_unpacked(entries: Iterable[TensorEntry], packed: Mapping[str, PackedTensor]) -> tuple[TensorEntry, ...]:
    """Entries of a header, those of packed codes as if the codes were unpacked, each at the place where it starts."""
    by_stored = {tensor.stored: tensor for tensor in packed.values()}
    return tuple(_unpacked(entry, by_stored.get(entry.name)) for entry in entries)


def _unpacked(entry: TensorEntry, tensor: PackedTensor | None) -> TensorEntry:
    if tensor is None:
        return entry
    size = tensor.rows * tensor.columns
    return TensorEntry(tensor.name, "I8", (tensor.rows, tensor.columns), entry.start, entry.start + size)


def _size(
    codes: Shape, shape: str, tensors: Mapping[str, Shape], read: Callable[[str], Bytes], allowed: Sequence[Any]
) -> tuple[int, int, int] | None:
    """Rows, columns and bits of a code; None if the tensors do not say."""
    (dtype, words), stated = codes, tensors.get(shape, ("", ()))
    if dtype != "I32" or len(words) != 2 or stated[0] not in _SHAPE_DTYPES or stated[1] != (2,):
        return None
    rows, columns = (int(size) for size in np.frombuffer(read(shape), _SHAPE_DTYPES[stated[0]]))
    bits = next((bits for bits in _BITS if bits in allowed and columns * bits == words[1] * _WORD_BITS), None)
    return None if bits is None or rows != words[0] or min(words) < 1 else (rows, columns, bits)
