"""The command line as torchrun starts it, one of whose ranks fails on the way: for tests/cli/test_torchrun.py.

The first argument is RANK:WHERE:HOW: the rank, "record" or "write", and "die" or "fail"; the others are the command's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from neuralink_cli.__main__ import main
from neuralink_cli.activations.spool import Spool
from neuralink_cli.files import stage_file
from tests.faults import die, fail

ACTIONS = {"die": die, "fail": fail}


def install(where: str, how: str) -> None:
    """Let this process do some work first, and then `how` happens."""
    owner, name, spared = {"record": (Spool, "append", 5), "write": (stage_file, "write_all", 1)}[where]
    real = getattr(owner, name)
    calls = 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > spared:
            ACTIONS[how]()
        real(*arguments)

    setattr(owner, name, failing)


if __name__ == "__main__":
    rank, where, how = sys.argv.pop(1).split(":")
    if os.environ["RANK"] == rank:
        install(where, how)
    main()
