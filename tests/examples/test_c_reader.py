"""The reader in C against one in Python: every bundle of every kind of layout, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.storage.reader import FlashReader
from tests.checkpoints import NEURONS
from tests.damage import FLASH
from tests.layouts import LayoutFactory

SOURCES = Path(__file__).parents[2] / "examples/c_reader"
COMPILER = shutil.which(os.environ.get("CC", "cc"))
VALGRIND = shutil.which("valgrind")
INDEX = "model.flash.json"
CHECKED = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-O1", "-g")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.skipif(COMPILER is None and not os.environ.get("CI"), reason="there is no C compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None, "the C reader must be compiled where CI runs: install a C compiler, or set CC"
    output = tmp_path_factory.mktemp("c_reader") / "flash_read"
    command = [COMPILER, *CHECKED, "-o", str(output), str(SOURCES / "flash_read.c")]
    # With the sanitizers where the compiler has them.
    for options in (SANITIZED, ()):
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            break
    assert (result.returncode, result.stderr) == (0, "")
    return output


def go(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def fnv1a(data: bytes) -> str:
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return f"{found:016x}"


def expected_of(layout: Path, block_id: str, neurons: list[int]) -> str:
    with FlashReader(layout) as reader:
        block = reader.block(block_id)
        slot_of = np.argsort(reader.order(block))
        slots = [int(slot_of[neuron]) for neuron in neurons]
        bundles = [reader.read_bundles(block, [slot]).bundles.tobytes() for slot in slots]
    lines = [f"neuron {n} slot {s} {fnv1a(b)}" for n, s, b in zip(neurons, slots, bundles, strict=True)]
    return "\n".join([*lines, f"total {len(neurons)} {fnv1a(b''.join(bundles))}", ""])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {}),
        ("opt", {"dtype": "BF16", "resident": "gate", "shards": 2}),
        ("llama", {"dtype": "F16", "alignment": 512}),
        ("llama", {"resident": "gate"}),
        ("gpt2", {"dtype": "F8_E4M3"}),
    ],
)
def test_it_reads_what_python_reads(
    program: Path, layouts: LayoutFactory, family: str, options: dict[str, Any]
) -> None:
    layout = layouts.bundled(family, **options).layout
    for block in ("layers.0", "layers.1"):
        every = go(program, layout, block)
        assert (every.returncode, every.stderr) == (0, "")
        assert every.stdout == expected_of(layout, block, list(range(NEURONS)))
    some = [NEURONS - 1, 0, 7, 7]
    assert go(program, layout, "layers.1", *some).stdout == expected_of(layout, "layers.1", some)


@pytest.mark.skipif(VALGRIND is None, reason="there is no valgrind")
@pytest.mark.parametrize("block", ["layers.0", "absent"])
def test_nothing_leaks(tmp_path: Path, layouts: LayoutFactory, block: str) -> None:
    program = tmp_path / "flash_read"
    assert COMPILER is not None
    subprocess.run([COMPILER, *CHECKED, "-o", program, SOURCES / "flash_read.c"], check=True)
    command = [str(VALGRIND), "-q", "--leak-check=full", "--show-leak-kinds=all", "--error-exitcode=99"]
    result = subprocess.run(
        [*command, program, layouts.bundled("opt").layout, block, "3"], capture_output=True, text=True, check=False
    )
    assert result.returncode == (0 if block == "layers.0" else 1), result.stderr


Change = Callable[[dict[str, Any]], object]


def set_in_block(key: str, value: object) -> Change:
    return lambda index: index["blocks"][0].update({key: value})


def set_in_range(key: str, field: str, value: object) -> Change:
    return lambda index: index["blocks"][0][key].update({field: value})


CHANGES: dict[str, tuple[Change, str]] = {
    "other format": (lambda i: i.update(format="neuralink-permuted"), 'format is not "neuralink-flash"'),
    "other version": (lambda i: i.update(version=2), "version is 2, not from 1 to 1"),
    "no version": (lambda i: i.pop("version"), "version is missing"),
    "no file": (lambda i: i.pop("file"), "file is missing"),
    "file elsewhere": (lambda i: i["file"].update(name="../model.flash.safetensors"), "name is not a plain one"),
    "hidden file": (lambda i: i["file"].update(name=".x"), "name is not a plain one"),
    "absent file": (lambda i: i["file"].update(name="x"), "No such file"),
    "other size": (lambda i: i["file"].update(bytes=i["file"]["bytes"] + 1), "the index says"),
    "no block": (lambda i: i.update(blocks=[]), "no block layers.0"),
    "blocks no list": (lambda i: i.update(blocks={}), "blocks is not a list"),
    "negative": (set_in_block("neurons", -1), "neurons is not a whole number"),
    "fraction": (set_in_block("neurons", 37.0), "neurons is not a whole number"),
    "text": (set_in_block("stride", "80"), "stride is not a whole number"),
    "none": (set_in_block("stride", 0), "stride is 0, not from 1"),
    "huge": (set_in_block("neurons", 2**64), "neurons is too large"),
    "too many": (set_in_block("neurons", 2**24), "bytes is"),
    "stride": (set_in_block("stride", 4), "bytes is"),
    "outside": (set_in_range("bundles", "offset", 2**40), "offset is"),
    "order dtype": (set_in_range("order", "dtype", "I64"), 'dtype is not "I32"'),
    "order elsewhere": (set_in_range("order", "offset", 8), "the order is no permutation"),
    "order outside": (set_in_range("order", "offset", 2**63), "offset is"),
    "order no range": (set_in_block("order", 3), "no object where bytes should be"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_index(program: Path, layouts: LayoutFactory, tmp_path: Path, name: str) -> None:
    change, complaint = CHANGES[name]
    layout = Path(shutil.copytree(layouts.bundled("opt").layout, tmp_path / "layout"))
    document = json.loads((layout / INDEX).read_text())
    change(document)
    (layout / INDEX).write_text(json.dumps(document))
    result = go(program, layout, "layers.0")
    assert (result.returncode, result.stdout) == (1, "")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "[]", "3", "{}x", '{"a"}', '{"a":}', '{"a":1,}', '{"a":01}', '{"a":1.}', '{"a":+1}', '{"a":.5}',
        '{"a":1e}', '{"a":tru}', '{"a":"\n"}', '{"a":"\\x"}', '{"a":"\\u12g4"}', '{"a":"', '{"a":[1,]}', '{"a":[1 2]}',
        '{"a" 1}', "{a:1}", "{'a':1}", '{"a":NaN}', '{"a":"\\', '{"a":-}', "[" * 40 + "]" * 40, '{"a":' * 99,
    ],
)  # fmt: skip
def test_what_is_no_json(program: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    result = go(program, tmp_path, "layers.0")
    assert result.returncode == 1
    assert "not a JSON object" in result.stderr or "has 0 bytes" in result.stderr


@pytest.mark.parametrize("seed", range(4))
def test_no_prefix_and_no_flipped_byte_of_an_index_crashes_it(
    program: Path, layouts: LayoutFactory, tmp_path: Path, seed: int
) -> None:
    layout = layouts.bundled("opt").layout
    (tmp_path / FLASH).symlink_to(layout / FLASH)
    text, random = (layout / INDEX).read_bytes(), np.random.default_rng(seed)
    for _ in range(25):
        place = int(random.integers(0, len(text)))
        changed = bytearray(text)
        changed[place] ^= 1 << int(random.integers(0, 8))
        for content in (text[:place], bytes(changed)):
            (tmp_path / INDEX).write_bytes(content)
            assert go(program, tmp_path, "layers.0", 3).returncode in (0, 1)


def test_duplicate_keys_are_refused(program: Path, layouts: LayoutFactory, tmp_path: Path) -> None:
    layout = layouts.bundled("opt").layout
    (tmp_path / INDEX).write_text('{"version": 1, ' + (layout / INDEX).read_text().lstrip("{"))
    assert "version is there twice" in go(program, tmp_path, "layers.0").stderr


def test_other_wrong_input(program: Path, layouts: LayoutFactory, tmp_path: Path) -> None:
    layout = layouts.bundled("opt").layout
    assert go(program).returncode == go(program, layout).returncode == 2
    for neuron in (NEURONS, -1, "x", "", "3x", " 3", "99999999999999999999999"):
        result = go(program, layout, "layers.0", neuron)
        assert result.returncode == 1
        assert f"is not a neuron from 0 to {NEURONS - 1}" in result.stderr
    assert "No such file" in go(program, tmp_path, "layers.0").stderr
    (tmp_path / INDEX).mkdir()
    assert "not a file" in go(program, tmp_path, "layers.0").stderr
    cut = Path(shutil.copytree(layout, tmp_path / "cut"))
    (cut / FLASH).write_bytes((cut / FLASH).read_bytes()[:-1])
    assert "the index says" in go(program, cut, "layers.0").stderr


def test_the_makefile_builds_it(tmp_path: Path) -> None:
    for name in ("flash_read.c", "Makefile"):
        shutil.copy(SOURCES / name, tmp_path)
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    subprocess.run(["make", "-s", "-C", tmp_path, f"CC={COMPILER}"], check=True)
    assert go(tmp_path / "flash_read").returncode == 2
    subprocess.run(["make", "-s", "-C", tmp_path, "clean"], check=True)
    assert not (tmp_path / "flash_read").exists()
