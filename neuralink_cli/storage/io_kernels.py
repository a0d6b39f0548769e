"""Loops that keep many reads in flight without holding the GIL: Linux's native asynchronous I/O, and plain pread.

They report how many bytes each read brought, or a negative number if it failed. The caller finishes short reads.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from neuralink_cli.kernels import kernel

# Numbers of the system calls io_setup, io_destroy, io_submit, io_getevents.
_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_SETUP, _DESTROY, SUBMIT, GET_EVENTS = _NUMBERS.get(platform.machine(), (-1, -1, -1, -1))
# Words of the kernel's structures iocb and io_event.
IOCB_WORDS = 8
EVENT_WORDS = 4
NOT_READ = -(1 << 40)
# How often in a row waiting may be interrupted by a signal.
_PATIENCE = 1000

_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))
_memmove = types.ExternalFunction("memmove", types.uintp(types.uintp, types.uintp, types.uintp))
_syscall = types.ExternalFunction(
    "syscall", types.intp(types.intp, types.uintp, types.intp, types.intp, types.uintp, types.uintp)
)


def asynchronous() -> bool:
    """Whether the system has asynchronous reads (a sandbox may forbid them)."""
    if not sys.platform.startswith("linux") or SUBMIT < 0 or sys.byteorder != "little":
        return False
    context = open_context(1)
    if context is not None:
        close_context(context)
    return context is not None


def open_context(depth: int) -> int | None:
    """A context for `depth` asynchronous reads in flight; None if the system has none left."""
    context = ctypes.c_ulong(0)
    if ctypes.CDLL(None).syscall(ctypes.c_long(_SETUP), ctypes.c_uint(depth), ctypes.byref(context)) != 0:
        return None
    return context.value


def close_context(context: int) -> None:
    """Release a context; waits for its reads."""
    ctypes.CDLL(None).syscall(ctypes.c_long(_DESTROY), ctypes.c_ulong(context))


def _fetch_add(_: Any, array: Any) -> Any:
    """fetch_add(int64[1]) -> int64: return the element and add one to it, atomically."""
    if array != types.int64[::1]:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(array), generate


fetch_add = intrinsic(_fetch_add)


@kernel
def pack(buffer: Any, places: Any, sizes: Any) -> None:
    """Move ranges of `buffer`, uint8, to lie one after the other from its start, in the order given.

    Args:
        places, sizes: int64 `[k]`; no range may begin before the ones before it end when packed.
    """
    start = np.uintp(buffer.ctypes.data)
    end = np.uintp(0)
    for k in range(places.size):
        _memmove(start + end, start + np.uintp(places[k]), np.uintp(sizes[k]))
        end += np.uintp(sizes[k])


@kernel
def read_in_turn(descriptor: Any, turn: Any, offsets: Any, sizes: Any, addresses: Any, results: Any) -> None:
    """Read whichever range is next in turn until none is left; any number of threads may share the same arguments.

    Args:
        turn: int64 `[1]`, 0 at the start.
        offsets, sizes, addresses: int64 `[k]`: where in the file, how much, where in memory.
        results: int64 `[k]`, filled with the bytes read, or -1.
    """
    k = fetch_add(turn)
    while k < offsets.size:
        results[k] = _pread(descriptor, np.uintp(addresses[k]), np.uintp(sizes[k]), offsets[k])
        k = fetch_add(turn)


@kernel
def read_asynchronously(
    descriptor: Any,
    turn: Any,
    offsets: Any,
    sizes: Any,
    addresses: Any,
    results: Any,
    submit: Any,
    get_events: Any,
    context: Any,
    events: Any,
) -> Any:
    """As `read_in_turn`, with several reads of this thread in flight.

    Reads are submitted one by one: a device that gets them in one batch sits idle while the batch is put together.

    Args:
        results: int64 `[k]`, filled with the bytes read, or minus the error number.
        submit, get_events: Numbers of the system calls.
        context: From `open_context`, for this thread alone.
        events: int64 `[depth, EVENT_WORDS]`, room for results; its length is how many reads are in flight.

    Returns:
        Reads still in flight: 0, unless waiting for them fails. Reads that could not start keep their result.
    """
    request = np.zeros(IOCB_WORDS, dtype=np.uint64)
    pointer = np.empty(1, dtype=np.uint64)
    pointer[0] = request.ctypes.data
    depth, in_flight, failures = events.shape[0], 0, 0
    k = fetch_add(turn)
    while k < offsets.size or in_flight:
        while k < offsets.size and in_flight < depth:
            request[0] = k
            request[2] = np.uint64(descriptor) << np.uint64(32)
            request[3] = addresses[k]
            request[4] = sizes[k]
            request[5] = offsets[k]
            if _syscall(submit, np.uintp(context), 1, pointer.ctypes.data, np.uintp(0), np.uintp(0)) == 1:
                in_flight += 1
            elif in_flight:
                break
            k = fetch_add(turn)
        if in_flight:
            came = _syscall(get_events, np.uintp(context), 1, depth, np.uintp(events.ctypes.data), np.uintp(0))
            for e in range(came):
                results[events[e, 0]] = events[e, 2]
            in_flight -= max(came, 0)
            failures = failures + 1 if came <= 0 else 0
            if failures > _PATIENCE:
                break
    return in_flight
