"""Entry point of `neuralink` and `python -m neuralink_cli`."""

from __future__ import annotations

import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from neuralink_cli.cli.entry import run
        from neuralink_cli.signals import ignore_signals

        code = run(sys.argv[1:])
        # Whatever comes from here on changes nothing any more, and must not print a traceback.
        ignore_signals()
    except KeyboardInterrupt:
        # While modules were being imported: nothing was begun.
        if sys.stderr is not None:
            sys.stderr.write("neuralink: error: interrupted; nothing unfinished was left behind\n")
        code = _INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
