"""An open safetensors file: its validated header, and its tensors as raw bytes."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from neuralink_cli.arrays import Bytes
from neuralink_cli.errors import InputError
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.files.header import INCOMPLETE, LENGTH_BYTES, MAX_HEADER_BYTES, Header, TensorEntry, parse_header
from neuralink_cli.files.lfs import is_lfs_pointer


class TensorFile(ByteFile):
    """Reads tensors of one safetensors file as raw bytes. Use as a context manager.

    Raises:
        InputError: The file is missing, a Git LFS pointer, truncated, or its header is malformed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.header = self._read_header()
        except OSError as error:
            self.close()
            raise InputError(f"cannot be read ({error.strerror})", where=path) from None
        except InputError:
            self.close()
            raise
        self._by_name = {entry.name: entry for entry in self.header.entries}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def entry(self, name: str) -> TensorEntry:
        """The header's entry of a tensor.

        Raises:
            InputError: There is no such tensor.
        """
        if name not in self._by_name:
            raise InputError(f"tensor {name!r} is missing", where=self.path)
        return self._by_name[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes `start` to `stop` of a tensor, as a new uint8 array."""
        entry = self.entry(name)
        stop = entry.nbytes if stop is None else stop
        buffer = np.empty(stop - start, dtype=np.uint8)
        self.read_into(name, buffer, start)
        return buffer

    def read_into(self, name: str, buffer: Bytes, start: int = 0) -> None:
        """Fill a contiguous uint8 buffer with the bytes of a tensor from byte `start` on."""
        entry = self.entry(name)
        if start < 0 or start + buffer.nbytes > entry.nbytes:
            raise ValueError(f"bytes {start}..{start + buffer.nbytes} lie outside tensor {name!r}")
        self.read_at(self.header.offset_of(entry) + start, buffer)

    def map(self, name: str) -> Bytes:
        """The bytes of a tensor that is not empty, mapped from the file, as uint8 (see `map_range`)."""
        entry = self.entry(name)
        return self.map_range(self.header.offset_of(entry), entry.nbytes)

    def _read_header(self) -> Header:
        start = os.pread(self._descriptor, 64, 0)
        if is_lfs_pointer(start):
            raise InputError(
                "is a Git LFS pointer, not the weights", where=self.path, fix="fetch them with `git lfs pull`"
            )
        if len(start) < LENGTH_BYTES:
            raise InputError(f"too short for a safetensors file ({self.size} bytes)", where=self.path)
        (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"is not a safetensors file (header length {length:,} is over the format's limit)",
                where=self.path,
            )
        if length > self.size - LENGTH_BYTES:
            raise InputError(
                f"truncated: the header should take {length:,} bytes, the file has {self.size:,}",
                where=self.path,
                fix=INCOMPLETE,
            )
        raw = np.empty(length, dtype=np.uint8)
        self.read_at(LENGTH_BYTES, raw)
        return parse_header(raw.tobytes(), self.size - LENGTH_BYTES - length, self.path)
