"""What the compiled kernels share: the decorator that compiles them, and the population count."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile `function` with numba: cached on disk, without the GIL, so that threads can share the work.

    numba has no type stubs; the result keeps the static type of `function`.
    """
    compiled: Function = njit(cache=True, nogil=True)(function)
    return compiled


def _popcount(_: Any, word: Any) -> Any:
    """popcount(uint64) -> uint64: LLVM's ctpop. Loops over words compile to vpopcntq on CPUs that have it."""
    if word != types.uint64:
        return None

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


popcount: Callable[[Any], Any] = intrinsic(_popcount)


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
