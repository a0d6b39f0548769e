"""What the compiled kernels share: the decorator that compiles them, and the population count."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import config, njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

_LOGGER = logging.getLogger(__name__)
# Of all that can be said of the cache, the first is said.
_remarked: list[str] = []


def kernel(function: Function) -> Function:
    """Compile `function` with numba: cached on disk, without the GIL, so that threads can share the work.

    numba has no type stubs; the result keeps the static type of `function`.
    """
    return _compiled(function)


def inlined_kernel(function: Function) -> Function:
    """As `kernel`, for a few lines that become part of every kernel that calls them.

    A call counts references to all arrays that it is given, one by one: more work than those lines, if they are given
    a tuple of arrays.
    """
    return _compiled(function, inline="always")


def _compiled(function: Function, **options: Any) -> Function:
    _allow_compiling()
    # No kernel is called back from C, and what that takes would be compiled for each.
    options |= {"nogil": True, "no_cfunc_wrapper": True}
    try:
        compiled: Any = njit(cache=True, **options)(function)
    except RuntimeError as error:
        # No folder that could hold a cache: another user's installation, and no home.
        _remark(f"compiled code cannot be kept ({error}), so every run compiles it again")
        compiled = njit(**options)(function)
    else:
        compiled._cache = _ForgivingCache(compiled._cache)
    return cast(Function, compiled)


class _ForgivingCache:
    """A cache of numba's that may be damaged, full or gone: then code is compiled instead, with one remark."""

    def __init__(self, cache: Any) -> None:
        self._numba = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numba, name)

    def load_overload(self, *arguments: Any) -> Any:
        """The code of a signature; None if there is none that can be used."""
        try:
            return self._numba.load_overload(*arguments)
        except Exception as error:
            self._give_up("read", error)
            return None

    def save_overload(self, *arguments: Any) -> None:
        """Keep the code of a signature, if that can be."""
        try:
            self._numba.save_overload(*arguments)
        except Exception as error:
            self._give_up("written", error)

    def _give_up(self, what: str, error: Exception) -> None:
        _remark(
            f"the cache of compiled code cannot be {what} ({type(error).__name__}: {error}), so it is compiled again; "
            f"delete {self._numba.cache_path} if this goes on"
        )
        # A damaged index stays in the way of writing a new one.
        with contextlib.suppress(Exception):
            self._numba.flush()


def load_compiler() -> None:
    """Load what running compiled kernels takes, some 60 MB, so that it counts as memory already in use."""
    _nothing()


def _allow_compiling() -> None:
    """Kernels call the system and use instructions that Python has not, so NUMBA_DISABLE_JIT is not for them.

    It is switched off for the whole process: numba looks at it again whenever it compiles.
    """
    if config.DISABLE_JIT:
        _remark("NUMBA_DISABLE_JIT is set, but these kernels exist only compiled: they are compiled all the same")
        config.DISABLE_JIT = False


def _remark(text: str) -> None:
    if not _remarked:
        _remarked.append(text)
        _LOGGER.warning("%s", text)


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


@kernel
def _nothing() -> int:
    return 0
