"""What a command says that it needs is what it takes: its peak resident memory, as the system counts it.

Since every command runs as a process of its own for that, here is also seen that another hash seed changes no byte.

Of `run`, `tests/sparse_models/test_memory.py` says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neuralink_cli.sizes import parse_size
from tests.checkpoints import files_of
from tests.cli.conftest import Neuralink
from tests.conftest import ModelFactory

# Runs a command and prints its peak after what it says itself; the system counts it once the process has ended.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "neuralink_cli", *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print("peak", usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def announced_in(said: str) -> int:
    """Bytes that a command announces."""
    found = re.search(r"(?:needs up to|takes about) ([0-9.]+ [kMG]?B) of memory", said)
    assert found is not None, said
    return parse_size(found[1])


def needs(*arguments: object) -> tuple[int, int]:
    """Bytes that a command announces, and bytes that it takes."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    # Sets are in another order there than here.
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return announced_in(done.stderr), int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss, and what counts as resident, differ")
def test_every_announcement_is_kept_and_the_bytes_do_not_depend_on_the_hash_seed(
    neuralink: Neuralink, model: ModelFactory, text_file: Path, tmp_path: Path
) -> None:
    opt, trace = model("opt"), tmp_path / "trace"
    assert neuralink("profile", opt, "--dataset", text_file, "-o", trace, "-q").code == 0
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    commands: list[tuple[object, ...]] = [
        # Experts of SiLU: thresholds are calibrated, and tokens have numbers.
        ("profile", model("mixtral"), "--dataset", text_file, "--active-ratio", "0.25"),
        ("cluster", trace, "--effort", "fast"),
        ("bench", here / "cluster", "--trace", trace),
        ("relayout", opt, "--placement", here / "cluster", "--resident", "gate"),
        ("verify", opt, here / "relayout"),
        ("restore", here / "relayout"),
    ]
    for command in commands:
        makes = command[0] not in ("bench", "verify")
        # Here first, since compiling code takes memory of its own.
        assert neuralink(*command, *(("-o", here / str(command[0])) if makes else ()), "-q").code == 0
        announced, taken = needs(*command, *(("-o", there / str(command[0])) if makes else ()))
        assert 1 <= announced / taken <= 1.15, (command, announced, taken)
    assert files_of(there) == files_of(here)
    assert {path.name for path in there.iterdir()} == {"profile", "cluster", "relayout", "restore"}
