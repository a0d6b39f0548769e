"""Signals that stop a command: raised once, held back while something is cleared up."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# A second signal within this time is the same wish as the first (a key held down, a group told twice).
PATIENCE_SECONDS = 5.0


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt so that outputs are cleaned up on the way out."""


class HungUp(BaseException):
    """SIGHUP: the terminal went away."""


_RAISED: dict[signal.Signals, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}


class _State:
    """What has happened so far.

    `first` is when the first signal was raised, or else when the process failed; `raised` is what the last one raised.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.raised: type[BaseException] | None = None
        self.inside = False
        self.again = False
        self.held = 0
        self.waiting: type[BaseException] | None = None


_state = _State()


def _handle(number: int, _frame: FrameType | None) -> None:
    if _state.first is not None and time.monotonic() - _state.first < PATIENCE_SECONDS:
        return
    kind = _RAISED[signal.Signals(number)]
    if _state.held:
        _state.waiting = kind
        return
    _raise(kind)


def _raise(kind: type[BaseException]) -> None:
    _state.again = _state.first is not None
    _state.first = time.monotonic()
    _state.raised = kind
    raise kind


@contextlib.contextmanager
def stopping_signals() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise, unless whoever started the process had them ignored.

    After a first signal others are ignored while the command clears up, for some seconds; then they raise again. That
    lasts beyond the block, until the process has told of it and ends.
    """
    _state.__init__()  # type: ignore[misc]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _RAISED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    _state.inside = True
    try:
        yield
    finally:
        _state.inside = False
        if _state.first is None:
            for number, handler in before.items():
                signal.signal(number, handler)


def fail_undisturbed() -> None:
    """Ignore signals for some seconds, as after a first one: the process has failed, and is about to tell why."""
    if _state.first is None:
        _state.first = time.monotonic()


def ignore_signals() -> None:
    """Ignore them from here on: the process has said what it had to say, and ends."""
    for number in _RAISED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Within the block a signal is held back; it raises at the end, if none has been raised before."""
    if threading.current_thread() is not threading.main_thread():
        # Signals are raised in the main thread only.
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
    waiting = _state.waiting
    if not _state.held and waiting is not None:
        _state.waiting = None
        _raise(waiting)


def raise_lost_signal() -> None:
    """Raise again what a signal raised, if it did not get anywhere: Python drops what is raised within a finalizer.

    Called before an output takes its place, where a command that was stopped never comes.
    """
    if _state.inside and _state.raised is not None and threading.current_thread() is threading.main_thread():
        raise _state.raised


def was_stopped_again() -> bool:
    """Whether a later signal stopped the clearing up after the first."""
    return _state.again
