"""Exit codes: stable, documented, and defined only here."""

from __future__ import annotations

from neuralink_cli import errors

VERIFICATION = 1
USAGE = 2
INPUT = 3
UNSUPPORTED = 4
MISMATCH = 5
OUTPUT = 6
MISSING_DEPENDENCY = 7
OUT_OF_MEMORY = 8
WORKER = 9
INTERNAL = 70
HUNG_UP = 129
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

EXIT_CODE_MEANINGS = {
    0: "success",
    VERIFICATION: "verification failed: the layout does not hold what it claims, or misses a gate such as --fail-below",
    USAGE: "wrong usage: an unknown option, or options that cannot be combined",
    INPUT: "an input is missing, unreadable, truncated or malformed",
    UNSUPPORTED: "an input is not supported (architecture, quantised or pickled weights, ...)",
    MISMATCH: "inputs that do not belong together (another model's trace, placement or layout)",
    OUTPUT: "the output exists, cannot be written, or does not fit on the disk",
    MISSING_DEPENDENCY: "an optional package is not installed",
    OUT_OF_MEMORY: "out of memory",
    WORKER: "a process or machine that shares the work ended, failed or does not answer",
    INTERNAL: "internal error: a bug in neuralink",
    HUNG_UP: "the terminal went away (SIGHUP)",
    INTERRUPTED: "interrupted (Ctrl-C)",
    BROKEN_PIPE: "the reader of stdout closed the pipe",
    TERMINATED: "terminated (SIGTERM)",
}

_CODES: dict[type[BaseException], int] = {
    errors.VerificationError: VERIFICATION,
    errors.OptionError: USAGE,
    errors.InputError: INPUT,
    errors.UnsupportedError: UNSUPPORTED,
    errors.MismatchError: MISMATCH,
    errors.OutputError: OUTPUT,
    errors.MissingDependencyError: MISSING_DEPENDENCY,
    errors.WorkerError: WORKER,
}


def exit_code(error: errors.NeuralinkError) -> int:
    """The exit code of a failure: that of its nearest class that has one."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
