"""Weights of a layout that stay in DRAM: mapped from the file as they are stored, or converted once, piece by piece.

Either way a weight is in memory once, however large its tensor.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.files.bulk_io import PAGE
from neuralink_cli.files.header import DTYPE_BITS
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.sparse_models.tensors import TORCH_DTYPES, as_tensor, as_weights
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, SOURCE

# Smaller tensors are read: a mapping takes whole pages.
_MAPPED_FROM = 1 << 20
# Bytes that are converted at a time.
_STRETCH = 1 << 22
# Bytes by which tensors that are not equal are nearly always told apart.
_GLANCE = 1 << 12


@dataclass(eq=False)
class StoredWeights:
    """A tensor of the flash file that is not in memory yet.

    It stands in for a tensor in a state dict: transformers takes a slice of it, all of it, and asks for the dtype that
    the model needs there.

    Attributes:
        tensor: Its name in the file.
        dtype, shape: Of the weights.
        weights: The format in which they are stored; `source` if they are of `dtype`, else rows of blocks.
        shared: Whether several weights of the model are this one, which is then the same tensor for all that ask.
    """

    file: TensorFile
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    weights: str = SOURCE
    shared: bool = False
    _made: torch.Tensor | None = None
    _lock: Any = field(default_factory=threading.Lock)

    def __getitem__(self, _all: object) -> StoredWeights:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: ARG002
        """The weights as a tensor in memory.

        Args:
            dtype: What to convert them to; None for what they are.

        Raises:
            UnsupportedError: Their dtype is not supported.
            InputError: Reading fails.
        """
        wanted = self._torch_dtype if dtype is None else dtype
        if not self.shared:
            return self._in_memory(wanted)
        with self._lock:
            if self._made is None or self._made.dtype != wanted:
                self._made = self._in_memory(wanted)
            return self._made

    def _in_memory(self, dtype: torch.dtype) -> torch.Tensor:
        kept = self.weights == SOURCE and self._torch_dtype == dtype
        return self._as_stored() if kept else self._converted(dtype)

    @property
    def _torch_dtype(self) -> torch.dtype:
        if self.weights != SOURCE:
            return torch.float32
        if self.dtype not in TORCH_DTYPES:
            raise UnsupportedError(f"cannot compute with tensors of dtype {self.dtype}", where=self.file.path)
        return TORCH_DTYPES[self.dtype]

    def _as_stored(self) -> torch.Tensor:
        entry = self.file.entry(self.tensor)
        aligned = self.file.header.offset_of(entry) * 8 % DTYPE_BITS[self.dtype] == 0
        data = None
        if entry.nbytes >= _MAPPED_FROM and aligned:
            try:
                data = self.file.map(self.tensor)
                # What is needed for every token is better found now than while the first is computed.
                data[::PAGE].max()
            except InputError:
                # The file system has no mappings: the memory is the same.
                data = None
        if data is None:
            data = self.file.read(self.tensor)
        return as_tensor(data, self.dtype, self.shape, self.file.path)

    def _converted(self, dtype: torch.dtype) -> torch.Tensor:
        hidden = self.shape[-1] if self.shape else 1
        rows = math.prod(self.shape[:-1])
        made = torch.empty(self.shape, dtype=dtype)
        flat = made.view(rows, hidden)
        row = BLOCK_FORMATS[self.weights].row_bytes(hidden) if self.weights != SOURCE else hidden * self._element
        at_once = max(_STRETCH // max(row, 1), 1)
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            data = self.file.read(self.tensor, first * row, (first + count) * row).reshape(count, row)
            flat[first : first + count].copy_(as_weights(data, self.weights, self.dtype, hidden, self.file.path))
        return made

    @property
    def _element(self) -> int:
        _ = self._torch_dtype
        return DTYPE_BITS[self.dtype] // 8


def with_equals_shared(tensors: Iterable[tuple[str, StoredWeights]]) -> dict[str, StoredWeights]:
    """Tensors by name, with one for those whose bytes are equal: an embedding that is stored again as the head."""
    by_kind: dict[object, list[StoredWeights]] = {}
    found = {}
    for name, stored in tensors:
        size = stored.file.entry(stored.tensor).nbytes
        if size < _MAPPED_FROM:
            found[name] = stored
            continue
        # How it starts tells nearly all others apart, so that few pairs are compared.
        start = stored.file.read(stored.tensor, 0, _GLANCE).tobytes()
        alike = by_kind.setdefault((stored.dtype, stored.shape, stored.weights, start), [])
        same = next((other for other in alike if _equal(stored, other)), None)
        if same is None:
            alike.append(stored)
        else:
            same.shared = True
        found[name] = stored if same is None else same
    return found


def _equal(one: StoredWeights, other: StoredWeights) -> bool:
    size = one.file.entry(one.tensor).nbytes
    if size != other.file.entry(other.tensor).nbytes:
        return False
    bounds: Sequence[int] = [*range(0, size, _STRETCH), size]
    return all(
        np.array_equal(one.file.read(one.tensor, start, stop), other.file.read(other.tensor, start, stop))
        for start, stop in itertools.pairwise(bounds)
    )


def resident_in(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each piece of memory counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
