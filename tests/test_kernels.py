"""Kernels work whatever becomes of numba's cache, with one remark. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, sys
import numpy as np
logging.basicConfig(format="%(message)s")
{before}
from neuralink_cli.devices.cost import order_cost
print(order_cost(np.ones((4, 1), dtype=np.uint64), np.arange(4), 2.0))
"""
NO_LOCATOR = "from numba.core import caching; caching.CacheImpl._locator_classes = []"


def cost(cache: Path, before: str = "", **env: str) -> list[str]:
    """What the remarks are; the result is always the same."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **env},
    )
    assert (result.returncode, result.stdout) == (0, "6.0\n"), result.stderr
    return result.stderr.splitlines()


def test_a_damaged_cache_is_compiled_again_and_mended(tmp_path: Path) -> None:
    assert cost(tmp_path) == []
    for suffix in (".nbi", ".nbc"):
        for path in tmp_path.rglob(f"*{suffix}"):
            path.write_bytes(b"junk")
        (remark,) = cost(tmp_path)
        assert remark.startswith("the cache of compiled code cannot be read")
        assert cost(tmp_path) == []


def test_nowhere_to_keep_compiled_code_is_one_remark(tmp_path: Path) -> None:
    (remark,) = cost(tmp_path, NO_LOCATOR)
    assert remark.startswith("compiled code cannot be kept")


def test_kernels_are_compiled_even_where_numba_is_told_not_to(tmp_path: Path) -> None:
    (remark,) = cost(tmp_path, NUMBA_DISABLE_JIT="1")
    assert remark.startswith("NUMBA_DISABLE_JIT is set")
