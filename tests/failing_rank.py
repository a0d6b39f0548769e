"""A rank that fails on the way, for tests/cli/test_torchrun.py.

Which, where and how is said as RANK:WHERE:HOW: the rank, "record" or "write", and "die" or "fail".
"""

from __future__ import annotations

import os
from typing import Any

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
