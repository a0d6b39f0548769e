"""The safetensors header: parsed more strictly than by the reference reader, and encoded reproducibly.

Layout: 8 bytes little-endian N, N bytes of JSON, then the data of all tensors without holes or overlaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import parse_object

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
INCOMPLETE = "copy or download it again, or make it again"
"""What to do about a file that was cut off."""
_MAX_SIZE = (1 << 64) - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `start` and `stop` are byte offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A validated header. `entries` are in data order; `raw` is the JSON text with its padding, as on disk."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """Absolute file offset of the data section."""
        return LENGTH_BYTES + len(self.raw)

    @property
    def data_bytes(self) -> int:
        """Size of the data section."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + self.data_bytes

    def offset_of(self, entry: TensorEntry) -> int:
        """Absolute file offset of a tensor."""
        return self.data_start + entry.start

    @property
    def prelude(self) -> bytes:
        """All bytes before the data section: length and JSON."""
        return struct.pack("<Q", len(self.raw)) + self.raw


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this dtype and shape takes.

    Raises:
        ValueError: Unknown dtype, more bits than 64 bits can count, or a sub-byte dtype that does not fill whole bytes.
    """
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    bits = 1
    # Checked at every step: the reference reader overflows even if a later zero makes the product 0.
    for size in (*shape, DTYPE_BITS[dtype]):
        bits *= size
        if bits > _MAX_SIZE:
            raise ValueError(f"shape {list(shape)} of dtype {dtype} overflows")
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of dtype {dtype} does not fill whole bytes")
    return bits // 8


def parse_header(raw: bytes, data_bytes: int, where: str | os.PathLike[str]) -> Header:
    """Validate the JSON text of a header against the size of the data section that follows it.

    Raises:
        InputError: On anything the reference reader refuses, and on what it silently accepts: duplicate names, white
            space before the '{', and tensors with other keys than dtype, shape and data_offsets.
    """
    if not raw.startswith(b"{"):
        raise InputError("header does not start with '{', so this is not a safetensors file", where=where)
    document = parse_object(raw, where)
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", where=where)
    entries = sorted((_parse_entry(name, spec, where) for name, spec in document.items()), key=_data_order)
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise InputError(f"tensor {entry.name!r} {kind} (starts at {entry.start}, not {position})", where=where)
        position = entry.stop
    if position != data_bytes:
        kind = "truncated" if position > data_bytes else "longer than its header says"
        raise InputError(
            f"file is {kind}: {data_bytes:,} data bytes, {position:,} expected", where=where, fix=INCOMPLETE
        )
    return Header(entries=tuple(entries), metadata=metadata, raw=raw)


def build_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str],
    *,
    alignment: int = 8,
) -> Header:
    """Lay out tensors `(name, dtype, shape)` in the order given; the data section starts at a multiple of `alignment`.

    The same arguments always give the same bytes: `__metadata__` first, then the tensors in data order.
    """
    entries = []
    position = 0
    for name, dtype, shape in tensors:
        stop = position + tensor_bytes(dtype, shape)
        entries.append(TensorEntry(name, dtype, tuple(shape), position, stop))
        position = stop
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for entry in entries:
        if entry.name in document:
            raise ValueError(f"tensor {entry.name!r} is written twice")
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    raw = text + b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(raw):,} bytes is over the format's limit of {MAX_HEADER_BYTES:,}")
    return Header(entries=tuple(entries), metadata=dict(metadata), raw=raw)


def _data_order(entry: TensorEntry) -> tuple[int, int, str]:
    return entry.start, entry.stop, entry.name


def _parse_entry(name: str, spec: Any, where: str | os.PathLike[str]) -> TensorEntry:
    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"tensor {name!r} must have exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise InputError(f"tensor {name!r} has a malformed dtype, shape or data_offsets", where=where)
    try:
        size = tensor_bytes(dtype, shape)
    except ValueError as error:
        raise InputError(f"tensor {name!r}: {error}", where=where) from None
    start, stop = offsets
    if stop - start != size:
        raise InputError(
            f"tensor {name!r} spans {stop - start:,} bytes, but {dtype} {shape} takes {size:,}", where=where
        )
    return TensorEntry(name, dtype, tuple(shape), start, stop)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)
