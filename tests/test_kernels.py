"""Kernels work whatever becomes of numba's cache, with one remark."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from numba import config
from numba.core import caching

from neuralink_cli import kernels

MODULE = """
from neuralink_cli.kernels import kernel

@kernel
def doubled(value: int) -> int:
    return 2 * value
"""


@pytest.fixture
def remarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """Loads a module with a kernel, as a process that starts does, and runs it; what is said meanwhile."""
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))

    def load() -> list[str]:
        monkeypatch.setattr(kernels, "_remarked", [])
        caplog.clear()
        spec = importlib.util.spec_from_file_location("module_with_a_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # numba looks for the module of what it reads from the cache.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        assert module.doubled(3) == 6
        assert module.doubled.signatures
        return [record.getMessage() for record in caplog.records if record.name == "neuralink_cli.kernels"]

    return load


def test_a_damaged_cache_is_compiled_again_and_mended(remarks: Callable[[], list[str]], tmp_path: Path) -> None:
    assert remarks() == []
    for suffix in (".nbi", ".nbc"):
        damaged = list((tmp_path / "cache").rglob(f"*{suffix}"))
        assert damaged
        for path in damaged:
            path.write_bytes(b"junk")
        (remark,) = remarks()
        assert remark.startswith("the cache of compiled code cannot be read")
        assert remarks() == []


def test_nowhere_to_keep_compiled_code_is_one_remark(
    remarks: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    (remark,) = remarks()
    assert remark.startswith("compiled code cannot be kept")


def test_kernels_are_compiled_even_where_numba_is_told_not_to() -> None:
    """In a process of its own, since numba reads that from the environment as it starts."""
    script = "import logging; logging.basicConfig(format='%(message)s'); from neuralink_cli import kernels as k"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; k.load_compiler(); print(k._nothing.signatures)"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "[()]\n"), done.stderr
    (remark,) = done.stderr.splitlines()
    assert remark.startswith("NUMBA_DISABLE_JIT is set")
