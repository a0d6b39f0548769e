"""Weights whose codes are packed: as compressed-tensors does, `pack-quantized`, 4 or 8 bits a code, or MXFP4.

A checkpoint holds, in place of `x.weight`, a tensor `x.weight_packed`: I32 `[rows, columns * bits / 32]`, with the
numbers of rows and columns in `x.weight_shape`; or U8 `[rows, columns / 2]` of MXFP4. Everything else sees the codes as
they would be unpacked: a tensor `x.weight`, I8 `[rows, columns]`. Only who reads bytes of it has to know. Stacks of
matrices (`mxfp4_stacks.py`) keep the name under which they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuralink_cli.arrays import Bytes
from neuralink_cli.checkpoint.mxfp4_stacks import find_stacks, may_be_stack
from neuralink_cli.checkpoint.scaled_tensors import MX_BLOCK, MXFP4_PACKED, WAY_OUT, Shape, stated_groups
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
        shape: The tensor that holds rows and columns; None for MXFP4.
        bits: 4 or 8. The first code of a byte is in its low bits.
        floats: Whether codes are the 16 numbers of MXFP4. Else a code is the number that is meant plus half of what
            `bits` bits can count.
        stacked: How many matrices the rows are those of, one after the other; 0 if it is one matrix and no stack.
    """

    name: str
    stored: str
    shape: str | None
    rows: int
    columns: int
    bits: int
    floats: bool = False
    stacked: int = 0

    @property
    def entry_shape(self) -> tuple[int, ...]:
        """The shape of the tensor as it would be unpacked."""
        return (self.stacked, self.rows // self.stacked, self.columns) if self.stacked else (self.rows, self.columns)


def shapes_of(packed: Mapping[str, PackedTensor]) -> frozenset[str]:
    """The tensors that hold the numbers of rows and columns."""
    return frozenset(tensor.shape for tensor in packed.values() if tensor.shape is not None)


def find_packed_tensors(
    quantization: Any, tensors: Mapping[str, Shape], read: Callable[[str], Bytes], where: Path
) -> dict[str, PackedTensor]:
    """The packed weights, by the name of the matrix or stack; none if the config does not speak of any.

    Args:
        quantization: The `quantization_config` of the config.
        read: Gives the bytes of a tensor.

    Raises:
        UnsupportedError: Weights that are not symmetric, or packed in another way than is understood here.
    """
    if stacks := find_stacks(quantization, tensors, where):
        return {
            name: PackedTensor(name, name, None, stack.rows, stack.columns, 4, floats=True, stacked=stack.stacked)
            for name, stack in stacks.items()
        }
    every = list(stated_groups(quantization))
    groups = [weights for kind, weights in every if kind == _FORMAT]
    floats = any(kind == MXFP4_PACKED for kind, _ in every)
    if not groups and not floats:
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
            kind, words = tensors[stored]
            if floats and kind == "U8" and len(words) == 2 and not words[1] * 2 % MX_BLOCK and name not in tensors:
                found[name] = PackedTensor(name, stored, None, words[0], words[1] * 2, 4, floats=True)
                continue
            size = _size(tensors[stored], shape, tensors, read, allowed) if groups else None
            if size is None or name in tensors:
                raise UnsupportedError(
                    f"tensor {stored!r} is {kind} {list(words)}, not understood as codes of 4 or 8 bits that "
                    f"fill whole words with {_SHAPE}, nor as MXFP4",
                    where=where,
                    fix=WAY_OUT,
                )
            found[name] = PackedTensor(name, stored, shape, *size)
    return found


def may_be_packed(name: str) -> bool:
    """Whether a tensor of this name may hold packed codes."""
    return name.rpartition(".")[2] == PACKED or may_be_stack(name)


def as_unpacked(entries: Iterable[TensorEntry], packed: Mapping[str, PackedTensor]) -> tuple[TensorEntry, ...]:
    """Entries of a header, those of packed codes as if the codes were unpacked, each at the place where it starts."""
    by_stored = {tensor.stored: tensor for tensor in packed.values()}
    return tuple(_unpacked(entry, by_stored.get(entry.name)) for entry in entries)


def _unpacked(entry: TensorEntry, tensor: PackedTensor | None) -> TensorEntry:
    if tensor is None:
        return entry
    size = tensor.rows * tensor.columns
    return TensorEntry(tensor.name, "I8", tensor.entry_shape, entry.start, entry.start + size)


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
