"""A rank that fails on the way, for tests/cli/test_torchrun.py.

Torchrun starts it as a program. The first argument is RANK:WHERE:HOW: the rank, "record" or "write", and "die" or
"fail"; the others are the command's.
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


def install(failure: str) -> None:
    """If this process is the rank that is to fail, it does some work first, and then it happens."""
    rank, where, how = failure.split(":")
    if os.environ["RANK"] != rank:
        return
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
    install(sys.argv.pop(1))
    main()
