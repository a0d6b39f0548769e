"""What torchrun's environment variables say, and what must not be taken for them."""

from __future__ import annotations

import pytest

from neuralink_cli.errors import OptionError
from neuralink_cli.profiling.launch import Launch, find_launch

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_torchrun_says_which_rank_of_how_many_this_is() -> None:
    assert find_launch(TORCHRUN) == Launch(rank=5, count=8, local_rank=1, local_count=4, node=1, attempt="none/0/8")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # MPI, Slurm wrappers and Kubernetes operators set these as well.
        without("TORCHELASTIC_RUN_ID"),
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"TORCHELASTIC_RUN_ID": "x"},
        # One process: there is nobody to exchange anything with.
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_other_processes_run_alone(environment: dict[str, str]) -> None:
    assert find_launch(environment) is None


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        (without("MASTER_ADDR"), "MASTER_ADDR is missing"),
        (without("RANK"), "RANK is missing"),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8, 1 of 4 on this machine"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "rank 5 of 8, 4 of 4 on this machine"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(OptionError) as raised:
        find_launch(environment)
    assert f"make no sense ({problem})" in str(raised.value)
