"""Ranges of a file mapped into memory, thousands of them if need be.

Python's own mappings keep a descriptor each (until 3.13), and a process may have a thousand.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np

from neuralink_cli.arrays import Bytes

_FAILED = ctypes.c_void_p(-1).value


class _Mapped:
    """Memory of a mapping, for numpy; lives as long as any array in it."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def map_file(descriptor: int, offset: int, size: int) -> Bytes:
    """Map `size` bytes of an open file, at least one, as uint8 `[size]`; they stay mapped until the last view is gone.

    Pages come from the page cache when they are touched, and are copied for this process when it writes to them.

    Raises:
        OSError: The system cannot map them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_longlong)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    lead = offset % mmap.ALLOCATIONGRANULARITY
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, lead + size, access, mmap.MAP_PRIVATE, descriptor, offset - lead)
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = _Mapped(address + lead, size)
    # Not when the interpreter ends: whatever it frees last may still look at the memory.
    weakref.finalize(memory, libc.munmap, address, lead + size).atexit = False
    return np.asarray(memory)
