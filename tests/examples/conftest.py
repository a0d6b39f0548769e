"""The runtime in C, compiled once: its programs with sanitizers, and as a library that Python calls."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import neuralink as neuralink

FOLDER = Path(__file__).parents[2] / "examples/c_runtime"
PROGRAMS = ("flash_read", "flash_run", "embed")
LIBRARY = tuple(sorted(path for path in FOLDER.glob("*.c") if not path.stem.startswith(PROGRAMS)))
COMPILER = shutil.which(os.environ.get("CC", "cc"))
CHECKED = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
SANITIZED = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LIBRARIES = ("-lm", "-lpthread")
FUZZER = Path(__file__).parent / "c_runtime_fuzz.c"


@dataclass(frozen=True)
class CRuntime:
    """Compiled parts of the runtime.

    Attributes:
        checked: Folder of the programs with AddressSanitizer and UndefinedBehaviorSanitizer, if the compiler has them.
        fast: Folder of the programs as the Makefile builds them, and of the library `libneuralink.so`.
    """

    checked: Path
    fast: Path

    def shared_library(self) -> ctypes.CDLL:
        """The library, to call its functions."""
        return ctypes.CDLL(str(self.fast / "libneuralink.so"))


def sources_of(program: str) -> list[Path]:
    """The files of a program, which are not part of the library."""
    return sorted(FOLDER.glob(f"{program}*.c"))


def compile_c(output: Path, sources: Sequence[Path], options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Call the compiler; skips the test if there is none."""
    if COMPILER is None:
        assert not os.environ.get("CI"), "the runtime in C must be compiled where CI runs: install a C compiler"
        pytest.skip("there is no C compiler")
    command = [COMPILER, *CHECKED, *options, "-o", str(output), *map(str, sources), *LIBRARIES]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def c_runtime(tmp_path_factory: pytest.TempPathFactory) -> CRuntime:
    """The runtime in C, compiled by the first of the processes that run the tests."""
    base = tmp_path_factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own in that of the run.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "c_runtime"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _compile(tmp_path_factory.mktemp("compiling")).rename(folder)
    return CRuntime(folder / "checked", folder / "fast")


def _compile(folder: Path) -> Path:
    made = CRuntime(folder / "checked", folder / "fast")
    made.checked.mkdir()
    made.fast.mkdir()
    objects = _objects(made.checked, SANITIZED) or _objects(made.checked, ("-O0", "-g"))
    assert objects is not None
    sanitized = SANITIZED if objects[1] == SANITIZED else ()
    for name, sources in {**{program: sources_of(program) for program in PROGRAMS}, FUZZER.stem: [FUZZER]}.items():
        result = compile_c(made.checked / name, [*sources, *objects[0]], (*sanitized, f"-I{FOLDER}"))
        assert (result.returncode, result.stderr) == (0, "")
    for path in (*FOLDER.glob("*.[ch]"), FOLDER / "Makefile"):
        shutil.copy(path, made.fast)
    command = ["make", "-s", "-j2", "-C", str(made.fast), f"CC={COMPILER}", "CFLAGS=-O2 -fPIC"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    result = compile_c(made.fast / "libneuralink.so", [made.fast / f"{path.stem}.o" for path in LIBRARY], ("-shared",))
    assert (result.returncode, result.stderr) == (0, "")
    return folder


def _objects(folder: Path, options: tuple[str, ...]) -> tuple[list[Path], tuple[str, ...]] | None:
    """The library's objects, or None if they do not link with these options; warnings are errors of the test."""
    objects = [folder / f"{source.stem}.o" for source in LIBRARY]
    with ThreadPoolExecutor(2) as threads:
        made = threads.map(lambda source, to: compile_c(to, [source], ("-c", *options)), LIBRARY, objects)
        for result in made:
            assert (result.returncode, result.stderr) == (0, ""), result.stderr
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    linked = compile_c(folder / "probe", [probe], options)
    return (objects, options) if linked.returncode == 0 else None
