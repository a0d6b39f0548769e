"""What a command says that it needs is what it takes: its peak resident memory, as the system counts it.

Of `run`, `tests/runtime/test_memory.py` says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from neuralink_cli.sizes import parse_size
from tests.tiny_models import TEXT, build_model

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
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return announced_in(done.stderr), int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss, and what counts as resident, differ")
def test_every_announcement_is_kept(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "opt")
    (tmp_path / "text.txt").write_text(TEXT)
    trace, placement, layout = tmp_path / "trace", tmp_path / "placement", tmp_path / "layout"
    commands: list[tuple[object, ...]] = [
        ("profile", model, "--dataset", tmp_path / "text.txt", "-o", trace, "--overwrite"),
        ("cluster", trace, "-o", placement, "--effort", "fast", "--overwrite"),
        ("bench", placement, "--trace", trace),
        ("relayout", model, "--placement", placement, "--resident", "gate", "-o", layout, "--overwrite"),
        ("verify", model, layout),
        ("restore", layout, "-o", tmp_path / "restored", "--overwrite"),
    ]
    for command in commands:
        announced, taken = needs(*command)
        if announced < taken:
            # The first time code may have to be compiled, which takes memory of its own.
            announced, taken = needs(*command)
        assert 1 <= announced / taken <= 1.15, (command, announced, taken)
