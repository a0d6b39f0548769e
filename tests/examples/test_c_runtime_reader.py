"""The reader in C against one in Python: every bundle and weight of every kind of layout, and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.storage.reader import FlashReader
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS
from neuralink_cli.weight_formats.quantising import dequantise
from tests.checkpoints import NEURONS, RawTensor, decode, tensors_of, write_checkpoint, write_random_placement
from tests.damage import FLASH
from tests.examples.conftest import FOLDER, CRuntime
from tests.layouts import LayoutFactory, relayout

VALGRIND = shutil.which("valgrind")
INDEX = "model.flash.json"


@pytest.fixture(scope="module")
def program(c_runtime: CRuntime) -> Path:
    return c_runtime.checked / "flash_read"


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


HIDDEN = 64


def write_finite(folder: Path, family: str, dtype: str) -> tuple[Path, Path]:
    """A checkpoint of normal weights of every magnitude that float16 has, and a placement for it."""
    tensors = tensors_of(family, dtype=dtype, hidden=HIDDEN)
    random = np.random.default_rng(3)
    for name, tensor in tensors.items():
        if tensor.dtype == dtype and len(tensor.shape) == 2:
            values = random.standard_normal(tensor.shape) * 10.0 ** random.integers(-8, 4, (tensor.shape[0], 1))
            bits = values.astype("<f4").view("<u4")
            data = (
                (bits >> 16).astype("<u2")
                if dtype == "BF16"
                else bits.view("<f4").astype({"F32": "<f4"}.get(dtype, "<f2"))
            )
            tensors[name] = RawTensor(dtype, tensor.shape, data.tobytes())
    model = write_checkpoint(folder / "model", family, tensors=tensors, config={"hidden_size": HIDDEN})
    return model, write_random_placement(model, folder / "placement", seed=1)


def values_of(rows: npt.NDArray[np.uint8], weights: str) -> npt.NDArray[np.float32]:
    """Rows of bytes as float32; `weights` is a weight format, or a dtype."""
    if weights in BLOCK_FORMATS:
        return dequantise(rows, BLOCK_FORMATS[weights])
    if weights == "BF16":
        return (rows.view("<u2").astype("<u4") << 16).view("<f4")
    return rows.view({"F32": "<f4", "F16": "<f2"}[weights]).astype("<f4")


def stored_values(layout: Path, block_number: int) -> dict[tuple[int, str, str], npt.NDArray[np.float32]]:
    """All weights of a block, by neuron, role and format."""
    block = json.loads((layout / INDEX).read_text())["blocks"][block_number]
    stored = {name: np.frombuffer(tensor.data, np.uint8) for name, tensor in decode(layout / FLASH).items()}
    bundles = stored[block["bundles"]["tensor"]].reshape(NEURONS, block["stride"])
    rows = {}
    for part in block["parts"]:
        rows[part["role"], part.get("weights", block["dtype"])] = bundles[:, part["offset"] :][:, : part["bytes"]]
    for kept in block["resident"]:
        if kept["kind"] == "rows":
            whole = stored[kept["place"]["tensor"]].reshape(NEURONS, -1)
            rows[kept["role"], kept.get("weights", block["dtype"])] = whole
    order = stored[block["order"]["tensor"]].view("<i4")
    decoded = {key: values_of(np.ascontiguousarray(each), key[1]) for key, each in rows.items()}
    return {(int(n), *key): each[k] for key, each in decoded.items() for k, n in enumerate(order)}


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", "F16", {}),
        ("llama", "BF16", {"weights": "q8_0"}),
        ("llama", "F32", {"weights": "q4_0", "resident": "gate"}),
        ("opt", "F16", {"weights": "iq4_nl"}),
        ("opt", "BF16", {"weights": "up=q8_0,down=iq4_nl", "resident": "gate"}),
        ("llama", "F16", {"weights": "gate=source,up=iq4_nl,down=q4_0", "rounding": "search"}),
        ("llama", "F32", {"weights": "gate=q8_0,up=source,down=source", "resident": "gate"}),
    ],
)
def test_it_decodes_what_python_decodes(
    program: Path, tmp_path: Path, family: str, dtype: str, options: dict[str, Any]
) -> None:
    layout = tmp_path / "layout"
    relayout(*write_finite(tmp_path, family, dtype), layout, **options)
    result = go(program, "--values", layout, "layers.1")
    assert (result.returncode, result.stderr) == (0, "")
    expected = stored_values(layout, 1)
    lines = [line.split(" ") for line in result.stdout.splitlines()]
    found = {(int(line[1]), line[4], line[5]): np.array(line[6:], dtype="<f4") for line in lines}
    assert len(lines) == len(found) == NEURONS * (3 if family == "llama" else 2)
    assert [int(line[1]) for line in lines] == sorted(int(line[1]) for line in lines)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].tobytes() == values.tobytes(), key
    # The checksums are of the same bundles.
    assert go(program, layout, "layers.1").stdout == expected_of(layout, "layers.1", list(range(NEURONS)))
    assert go(program, "--values", layout, "layers.1", 7, 7).stdout.splitlines() == 2 * [
        line for line in result.stdout.splitlines() if line.startswith("neuron 7 ")
    ]


@pytest.mark.parametrize("weights", ["q8_0", "q4_0", "iq4_nl"])
def test_it_decodes_every_code_and_scale(program: Path, tmp_path: Path, weights: str) -> None:
    layout = tmp_path / "layout"
    relayout(*write_finite(tmp_path, "opt", "F16"), layout, weights=weights)
    index = json.loads((layout / INDEX).read_text())
    place = index["blocks"][0]["bundles"]
    content = bytearray((layout / FLASH).read_bytes())
    random = np.random.default_rng(8)
    blocks = random.integers(
        0, 256, (place["bytes"] // BLOCK_FORMATS[weights].block_bytes, BLOCK_FORMATS[weights].block_bytes)
    )
    # Zeros, subnormal, smallest and largest ones, of both signs.
    scales = np.resize(np.array([0, 1, 0x3FF, 0x400, 0x7BFF, 0x8001, 0xFBFF, 0x3C00], "<u2"), len(blocks))
    data = blocks.astype(np.uint8)
    data[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    content[place["offset"] : place["offset"] + place["bytes"]] = data.tobytes()
    (layout / FLASH).write_bytes(content)
    lines = [line.split(" ") for line in go(program, "--values", layout, "layers.0").stdout.splitlines()]
    expected = stored_values(layout, 0)
    assert len(lines) == len(expected)
    for line in lines:
        assert np.array(line[6:], "<f4").tobytes() == expected[int(line[1]), line[4], line[5]].tobytes()


@pytest.mark.skipif(VALGRIND is None, reason="there is no valgrind")
@pytest.mark.parametrize("block", ["layers.0", "absent"])
def test_nothing_leaks(c_runtime: CRuntime, layouts: LayoutFactory, block: str) -> None:
    program = c_runtime.fast / "flash_read"
    command = [str(VALGRIND), "-q", "--leak-check=full", "--show-leak-kinds=all", "--error-exitcode=99"]
    result = subprocess.run(
        [*command, program, "--values", layouts.bundled("opt").layout, block, "3"],
        capture_output=True,
        text=True,
        check=False,
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


def set_in_part(key: str, value: object, part: int = 0) -> Change:
    return lambda index: index["blocks"][0]["parts"][part].update({key: value})


def set_in_rows(key: str, value: object) -> Change:
    return lambda index: index["blocks"][0]["resident"][0].update({key: value})


def set_in_place(key: str, value: object) -> Change:
    return lambda index: index["blocks"][0]["resident"][0]["place"].update({key: value})


# To a layout of q8_0 gates in memory and q4_0 up and down rows in bundles, of 64 weights each.
ROUNDED_CHANGES: dict[str, tuple[Change, str]] = {
    "unknown format": (set_in_part("weights", "q5_0"), "the weights of up are in an unknown format"),
    "a prefix": (set_in_part("weights", "q4_"), "the weights of up are in an unknown format"),
    "no name": (set_in_part("weights", None), "the weights of up are in an unknown format"),
    "other format": (set_in_part("weights", "q8_0"), "bytes is 36, not from 68 to 68"),
    "as in the source": (lambda i: i["blocks"][0]["parts"][1].pop("weights"), "bytes is 36, not from 256 to 256"),
    "same size": (
        lambda i: i["blocks"][0].update(parts=i["blocks"][0]["parts"][:1]),
        "stride is 72, the parts have 36",
    ),
    "no parts": (set_in_block("parts", []), "stride is 72, the parts have 0"),
    "parts no list": (set_in_block("parts", {}), "stride is 72, the parts have 0"),
    "a hole": (set_in_part("offset", 40, part=1), "offset is 40, not from 36 to 36"),
    "overlap": (set_in_part("offset", 0, part=1), "offset is 0, not from 36 to 36"),
    "overflow": (set_in_part("offset", 2**64 - 36, part=1), "offset is 18446744073709551580, not from 36 to 36"),
    "role": (set_in_part("role", "sideways"), "a role is not gate, up or down"),
    "role twice": (set_in_part("role", "down"), "the weights of down are there twice"),
    "gate twice": (set_in_part("role", "gate"), "the weights of gate are there twice"),
    "no whole blocks": (set_in_block("hidden", 65), "65 weights are no whole blocks of q4_0"),
    "other rows": (set_in_block("hidden", 96), "bytes is 36, not from 54 to 54"),
    "many weights": (set_in_block("hidden", 2**31), "hidden is 2147483648, not from 1 to"),
    "dtype": (set_in_block("dtype", "F8_E5M2"), "weights of dtype F8_E5M2 cannot be q4_0"),
    "unknown dtype": (set_in_block("dtype", "F7"), "a block has a dtype that this reader does not know"),
    "dtype of bundles": (set_in_range("bundles", "dtype", "F32"), 'dtype is not "U8"'),
    "rows in an unknown format": (set_in_rows("weights", "Q8_0"), "the weights of gate are in an unknown format"),
    "rows of another size": (set_in_rows("weights", "q4_0"), "bytes is 2516, not from 1332 to 1332"),
    "rows outside": (set_in_place("offset", 2**40), "offset is"),
    "dtype of rows": (set_in_place("dtype", "F32"), 'dtype is not "U8"'),
    "kind": (set_in_rows("kind", "columns"), "a kind is not rows, bias or output_bias"),
    "no place": (lambda i: i["blocks"][0]["resident"][0].pop("place"), "place is missing"),
    "resident no list": (set_in_block("resident", {}), "resident is not a list"),
}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    model, placement = write_finite(folder, "llama", "F32")
    relayout(model, placement, folder / "layout", weights="gate=q8_0,up=q4_0,down=q4_0", resident="gate")
    return folder / "layout"


@pytest.mark.parametrize("option", ["", "--values"])
@pytest.mark.parametrize("name", ROUNDED_CHANGES)
def test_a_wrong_index_of_rounded_weights(program: Path, rounded: Path, tmp_path: Path, name: str, option: str) -> None:
    change, complaint = ROUNDED_CHANGES[name]
    (tmp_path / FLASH).symlink_to(rounded / FLASH)
    document = json.loads((rounded / INDEX).read_text())
    change(document)
    (tmp_path / INDEX).write_text(json.dumps(document))
    result = go(program, *[option] * bool(option), tmp_path, "layers.0")
    assert (result.returncode, result.stdout) == (1, "")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_weights_of_other_dtypes_are_checked_but_not_decoded(program: Path, layouts: LayoutFactory) -> None:
    layout = layouts.bundled("gpt2", dtype="F8_E4M3").layout
    result = go(program, "--values", layout, "layers.0")
    assert (result.returncode, result.stdout) == (1, "")
    assert "weights of dtype F8_E4M3 can only be checked, not printed" in result.stderr


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


@pytest.mark.parametrize("kind", ["exact", "rounded"])
@pytest.mark.parametrize("seed", range(2))
def test_no_prefix_and_no_flipped_byte_of_an_index_crashes_it(
    program: Path, layouts: LayoutFactory, rounded: Path, tmp_path: Path, seed: int, kind: str
) -> None:
    layout = rounded if kind == "rounded" else layouts.bundled("opt").layout
    (tmp_path / FLASH).symlink_to(layout / FLASH)
    text, random = (layout / INDEX).read_bytes(), np.random.default_rng(seed)
    for _ in range(25):
        place = int(random.integers(0, len(text)))
        changed = bytearray(text)
        changed[place] ^= 1 << int(random.integers(0, 8))
        for content in (text[:place], bytes(changed)):
            (tmp_path / INDEX).write_bytes(content)
            assert go(program, "--values", tmp_path, "layers.0", 3).returncode in (0, 1)


def test_duplicate_keys_are_refused(program: Path, layouts: LayoutFactory, tmp_path: Path) -> None:
    layout = layouts.bundled("opt").layout
    (tmp_path / INDEX).write_text('{"version": 1, ' + (layout / INDEX).read_text().lstrip("{"))
    assert "version is there twice" in go(program, tmp_path, "layers.0").stderr


def test_other_wrong_input(program: Path, layouts: LayoutFactory, tmp_path: Path) -> None:
    layout = layouts.bundled("opt").layout
    assert go(program).returncode == go(program, layout).returncode == go(program, "--values", layout).returncode == 2
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


def test_the_makefile_builds_it_and_clears_up(c_runtime: CRuntime, tmp_path: Path) -> None:
    built = Path(shutil.copytree(c_runtime.fast, tmp_path / "built"))
    assert go(built / "flash_read").returncode == go(built / "flash_run").returncode == 2
    # Which the Makefile does not make.
    (built / "libneuralink.so").unlink()
    subprocess.run(["make", "-s", "-C", built, "clean"], check=True)
    assert {path.name for path in built.iterdir()} == {"Makefile"} | {path.name for path in FOLDER.glob("*.[ch]")}
