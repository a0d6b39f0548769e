"""Whether torchrun started this process, and as which of how many. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neuralink_cli.errors import OptionError

# Set by torchrun alone. Other launchers set RANK and WORLD_SIZE too, and so do people.
_MARK = "TORCHELASTIC_RUN_ID"
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The place of this process among the ranks that torchrun started.

    Attributes:
        rank: Its number among all, from 0.
        count: The number of all ranks.
        local_rank: Its number on this machine, from 0.
        local_count: The number of ranks on this machine.
        node: The number of this machine, from 0.
        attempt: What tells this start of the ranks from others of the same run.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    node: int
    attempt: str


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """The place that torchrun gave to a process with these environment variables; None if it is not one of several.

    RANK and WORLD_SIZE alone are no sign of torchrun.

    Raises:
        OptionError: torchrun's variables are incomplete or contradict each other.
    """
    if _MARK not in environment or "WORLD_SIZE" not in environment:
        return None
    count = _number(environment, "WORLD_SIZE")
    if count == 1:
        return None
    missing = [name for name in _ADDRESS if not environment.get(name)]
    if missing:
        raise _broken(f"{missing[0]} is missing")
    launch = Launch(
        rank=_number(environment, "RANK"),
        count=count,
        local_rank=_number(environment, "LOCAL_RANK"),
        local_count=_number(environment, "LOCAL_WORLD_SIZE"),
        node=_number(environment, "GROUP_RANK"),
        attempt=f"{environment[_MARK]}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/{count}",
    )
    if not (launch.rank < count and launch.local_rank < launch.local_count <= count):
        raise _broken(f"rank {launch.rank} of {count}, {launch.local_rank} of {launch.local_count} on this machine")
    return launch


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise _broken(f"{name} is {text!r}" if name in environment else f"{name} is missing")
    return int(text)


def _broken(what: str) -> OptionError:
    return OptionError(
        f"the environment variables of torchrun make no sense ({what})",
        fix=f"start with torchrun, or unset {_MARK} to run as one process",
    )
