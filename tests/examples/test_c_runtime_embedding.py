"""The library of the runtime in C in a program of one's own: embed.c, and C++."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.examples.conftest import FOLDER, LIBRARIES, LIBRARY, CRuntime
from tests.examples.test_c_runtime_models import TINY_RELU, lay_out

PROMPT = [1 + 7 * k % 250 for k in range(150)]
# With room for sanitizers.
MEGABYTES = 400

CPP = """
#include "neuralink.h"
int main() {
    NlError error = {};
    NlOptions options = {};
    return nl_open("nowhere", &options, &error) == nullptr && error.code == NL_BAD_LAYOUT ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("tiny_relu"), TINY_RELU, threshold=0.0)


def embed(c_runtime: CRuntime, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(c_runtime.checked / "embed"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_smallest_app_gives_the_tokens_of_the_program(c_runtime: CRuntime, layout: Path) -> None:
    outcome = embed(c_runtime, layout, MEGABYTES, 12, *PROMPT)
    assert outcome.returncode == 0
    progress = outcome.stderr.splitlines()
    assert len(progress) > 1
    assert progress[-1] == "prompt: 150 of 150 tokens"
    asked = f"generate 12 {' '.join(map(str, PROMPT))}\n"
    program = subprocess.run(
        [c_runtime.fast / "flash_run", layout], input=asked, capture_output=True, text=True, check=True
    )
    assert [f"token {line}" for line in outcome.stdout.splitlines()] == program.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1, 12, 5), "at least"),
        ((MEGABYTES, 12, 60000), "is not in the vocabulary"),
        ((MEGABYTES, 500, 5), "positions of the model"),
    ],
)
def test_it_says_what_is_wrong(c_runtime: CRuntime, layout: Path, arguments: tuple[int, ...], said: str) -> None:
    outcome = embed(c_runtime, layout, *arguments)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("embed: ")
    assert said in outcome.stderr


def test_it_stops_between_two_calls(c_runtime: CRuntime, layout: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b" " * 4096)
    os.set_blocking(writer, True)
    # It waits until there is room for its first token.
    command = [str(c_runtime.checked / "embed"), str(layout), str(MEGABYTES), "200", "1", "2", "3"]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.stderr is not None
    assert process.stderr.readline() == "prompt: 3 of 3 tokens\n"
    process.send_signal(signal.SIGINT)
    with os.fdopen(reader) as written:
        tokens = written.read().split()
    assert process.wait(timeout=60) == 0
    assert len(tokens) < 3
    process.stderr.close()


def test_programs_in_cpp_can_use_it(c_runtime: CRuntime, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "app.cpp").write_text(CPP)
    objects = [str(c_runtime.fast / f"{source.stem}.o") for source in LIBRARY]
    command = [compiler, "-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{FOLDER}", "app.cpp"]
    made = subprocess.run(
        [*command, *objects, *LIBRARIES, "-o", "app"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
    assert subprocess.run([tmp_path / "app"], check=False).returncode == 0
