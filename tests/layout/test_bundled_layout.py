"""The bundled layout, read as its description says: JSON and positional reads, none of the package's code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.layout.index import FLASH_SCHEMA
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import (
    ELEMENT_BYTES,
    FAMILIES,
    HIDDEN,
    LAYERS,
    NEURONS,
    README,
    RawTensor,
    deserialize,
    encode,
    files_of,
    tensors_of,
)
from tests.layouts import LayoutFactory, Made, relayout
from tests.traces import numbered_digests

Elements = npt.NDArray[np.uint8]
# Stems of layer k, and by role: weight, and whether the neurons are its columns.
STEMS = {
    "opt": "model.decoder.layers.{}.",
    "llama": "model.layers.{}.mlp.",
    "gpt2": "transformer.h.{}.mlp.",
    "bert": "bert.encoder.layer.{}.",
}
PARTS: dict[str, dict[str, tuple[str, bool]]] = {
    "opt": {"up": ("fc1", False), "down": ("fc2", True)},
    "llama": {"gate": ("gate_proj", False), "up": ("up_proj", False), "down": ("down_proj", True)},
    "gpt2": {"up": ("c_fc", True), "down": ("c_proj", False)},
    "bert": {"up": ("intermediate.dense", False), "down": ("output.dense", True)},
}


class Runtime:
    """A reader of the layout: `json`, `open`, `seek` and `read`."""

    def __init__(self, directory: Path) -> None:
        self.index: dict[str, Any] = json.loads((directory / "model.flash.json").read_bytes())
        self.path: Path = directory / self.index["file"]["name"]
        self.blocks = {block["id"]: block for block in self.index["blocks"]}

    def read(self, offset: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(count)
        assert len(data) == count
        return data

    def range(self, place: dict[str, Any]) -> bytes:
        return self.read(place["offset"], place["bytes"])

    def order(self, block: dict[str, Any]) -> list[int]:
        return [int(neuron) for neuron in np.frombuffer(self.range(block["order"]), dtype="<i4")]

    def neuron(self, block_id: str, neuron: int) -> dict[str, bytes]:
        """Weights of a neuron by role, whether they are in its bundle or resident."""
        block = self.blocks[block_id]
        slot = self.order(block).index(neuron)
        bundle = self.read(block["bundles"]["offset"] + slot * block["stride"], block["stride"])
        weights = {part["role"]: bundle[part["offset"] :][: part["bytes"]] for part in block["parts"]}
        for resident in block["resident"]:
            if resident["kind"] == "rows":
                row_bytes = resident["place"]["bytes"] // block["neurons"]
                weights[resident["role"]] = self.read(resident["place"]["offset"] + slot * row_bytes, row_bytes)
        return weights


def elements(tensor: RawTensor) -> Elements:
    """A tensor as an array whose last axis is the bytes of an element."""
    return np.frombuffer(tensor.data, dtype=np.uint8).reshape(*tensor.shape, ELEMENT_BYTES[tensor.dtype])


def expected_rows(tensors: dict[str, RawTensor], family: str, layer: int, role: str) -> Elements:
    """The weights of a part, neuron by neuron: uint8 `[n, bytes]`."""
    name, columns = PARTS[family][role]
    matrix = elements(tensors[f"{STEMS[family].format(layer)}{name}.weight"])
    rows = matrix.transpose(1, 0, 2) if columns else matrix
    return np.ascontiguousarray(rows).reshape(NEURONS, -1)


def bias(tensors: dict[str, RawTensor], family: str, layer: int, role: str) -> RawTensor:
    return tensors[f"{STEMS[family].format(layer)}{PARTS[family][role][0]}.bias"]


CASES = [
    *((family, "F32", resident) for family in FAMILIES for resident in ("none", "gate")),
    *((family, dtype, "none") for family in ("llama", "gpt2") for dtype in ("BF16", "F8_E4M3", "F64")),
]


@pytest.mark.parametrize(("family", "dtype", "resident"), CASES)
def test_a_runtime_finds_every_neuron(layouts: LayoutFactory, family: str, dtype: str, resident: str) -> None:
    made = layouts.bundled(family, dtype=dtype, resident=resident)
    tensors = tensors_of(family, dtype=dtype)
    runtime = Runtime(made.layout)
    assert list(runtime.blocks) == [f"layers.{layer}" for layer in range(LAYERS)]
    for layer in range(LAYERS):
        expected = {role: expected_rows(tensors, family, layer, role) for role in PARTS[family]}
        for neuron in range(NEURONS):
            found = runtime.neuron(f"layers.{layer}", neuron)
            assert found == {role: rows[neuron].tobytes() for role, rows in expected.items()}


@pytest.mark.parametrize(("family", "dtype", "resident"), CASES)
def test_the_index_says_what_it_must(layouts: LayoutFactory, family: str, dtype: str, resident: str) -> None:
    made = layouts.bundled(family, dtype=dtype, resident=resident)
    tensors = tensors_of(family, dtype=dtype)
    runtime = Runtime(made.layout)
    index = runtime.index
    jsonschema.Draft202012Validator(FLASH_SCHEMA.read()).validate(index)
    assert (index["layout"], index["resident"], index["alignment"]) == ("bundled", resident, 4096)
    content = runtime.path.read_bytes()
    assert index["file"]["bytes"] == len(content)
    assert index["file"]["sha256"] == hashlib.sha256(content).hexdigest()
    with Placement(made.placement) as placement, Checkpoint(made.model) as checkpoint:
        assert index["model"]["fingerprint"] == checkpoint.fingerprint
        assert index["provenance"]["placement_sha256"] == placement.content_sha256
        for layer, block in enumerate(index["blocks"]):
            placed = placement.blocks[block["id"]]
            assert runtime.order(block) == placed.order.tolist()
            assert runtime.range(block["frequency"]) == placed.frequency.tobytes()
            assert (block["neurons"], block["hidden"], block["dtype"]) == (NEURONS, HIDDEN, dtype)
            assert (block["threshold"], block["pinned"], block["collapse_gap"]) == (0.25, 3, 4)
            assert block["bundles"]["offset"] % 4096 == 0
            for tensor in block["resident"]:
                found = runtime.range(tensor["place"])
                match tensor["kind"]:
                    case "bias":
                        by_neuron = elements(bias(tensors, family, layer, tensor["role"]))
                        assert found == by_neuron[placed.order].tobytes()
                    case "output_bias":
                        assert found == bias(tensors, family, layer, "down").data
                    case "rows":
                        rows = expected_rows(tensors, family, layer, tensor["role"])
                        assert found == rows[placed.order].tobytes()
            kinds = [] if family == "llama" else ["bias", "output_bias"]
            assert [t["kind"] for t in block["resident"]] == (["rows"] if resident == "gate" else []) + kinds


@pytest.mark.parametrize(("family", "dtype", "resident"), CASES)
def test_the_reference_reader_opens_it(layouts: LayoutFactory, family: str, dtype: str, resident: str) -> None:
    made = layouts.bundled(family, dtype=dtype, resident=resident)
    tensors = tensors_of(family, dtype=dtype)
    found = {
        name: RawTensor(tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in deserialize((made.layout / "model.flash.safetensors").read_bytes())
    }
    part_names = {f"{STEMS[family].format(k)}{name}" for k in range(LAYERS) for name, _ in PARTS[family].values()}
    moved = {f"{name}.weight" for name in part_names}
    moved |= {f"{STEMS[family].format(k)}{PARTS[family]['up'][0]}.bias" for k in range(LAYERS)}
    for name, tensor in tensors.items():
        assert (name in found) == (name not in moved)
        assert name in moved or found[name] == tensor
    roles = [role for role in PARTS[family] if resident == "none" or role != next(iter(PARTS[family]))]
    with Placement(made.placement) as placement:
        for layer in range(LAYERS):
            order = placement.blocks[f"layers.{layer}"].order
            rows = [expected_rows(tensors, family, layer, role)[order] for role in roles]
            assert found[f"layers.{layer}.bundles"] == RawTensor(
                dtype, (NEURONS, len(roles) * HIDDEN), np.concatenate(rows, axis=1).tobytes()
            )
            assert found[f"layers.{layer}.order"] == RawTensor("I32", (NEURONS,), order.tobytes())
    for name, tensor in found.items():
        assert not name.startswith("padding.") or not any(tensor.data)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_files_of_the_source_are_kept(layouts: LayoutFactory, shards: int) -> None:
    made = layouts.bundled(shards=shards)
    runtime = Runtime(made.layout)
    source = files_of(made.model)
    weights = [name for name in source if name.endswith(".safetensors")]
    assert len(weights) == shards
    verbatim = ["README.md"] + (["model.safetensors.index.json"] if shards > 1 else [])
    assert {(s["name"], s["kind"]) for s in runtime.index["sources"]} == {
        *((name, "weights") for name in weights),
        *((name, "verbatim") for name in verbatim),
    }
    for stored in runtime.index["sources"]:
        content = runtime.range(stored["stored"])
        assert stored["bytes"] == len(source[stored["name"]])
        assert source[stored["name"]].startswith(content)
        if stored["kind"] == "verbatim":
            assert content == source[stored["name"]]
        assert runtime.index["digests"][stored["stored"]["tensor"]] == hashlib.sha256(content).hexdigest()
    beside = files_of(made.layout)
    assert set(beside) == {
        "README.md", "config.json", "tokenizer.json", "model.flash.json", "model.flash.safetensors"
    }  # fmt: skip
    for name in ("config.json", "tokenizer.json"):
        assert beside[name] == source[name]


def test_the_digests_are_those_of_the_small_tensors(layouts: LayoutFactory) -> None:
    runtime = Runtime(layouts.bundled("llama").layout)
    places = {
        block[what]["tensor"]: block[what] for block in runtime.blocks.values() for what in ("order", "frequency")
    }
    places |= {stored["stored"]["tensor"]: stored["stored"] for stored in runtime.index["sources"]}
    digests = {name: hashlib.sha256(runtime.range(place)).hexdigest() for name, place in places.items()}
    assert (
        runtime.index["digests"].pop("ordering_sequences") == hashlib.sha256(numbered_digests(2).tobytes()).hexdigest()
    )
    assert runtime.index["digests"] == digests


@pytest.mark.parametrize("alignment", [1, 512, 65_536])
def test_any_alignment_holds_the_same(layouts: LayoutFactory, alignment: int) -> None:
    runtime = Runtime(layouts.bundled("llama", dtype="BF16", alignment=alignment).layout)
    tensors = tensors_of("llama", dtype="BF16")
    for layer in range(LAYERS):
        assert runtime.blocks[f"layers.{layer}"]["bundles"]["offset"] % alignment == 0
        for role in PARTS["llama"]:
            rows = expected_rows(tensors, "llama", layer, role)
            assert runtime.neuron(f"layers.{layer}", 5)[role] == rows[5].tobytes()


def test_no_loader_takes_it_for_a_checkpoint(layouts: LayoutFactory) -> None:
    made = layouts.bundled(shards=2)
    names = set(files_of(made.layout))
    assert not names & {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
    assert not any(name.startswith("model-0") for name in names)
    with pytest.raises(UnsupportedError, match="is a flash layout, not a checkpoint; get the checkpoint back with"):
        Checkpoint(made.layout)


@pytest.mark.parametrize("layout", ["bundled", "permuted"])
def test_two_runs_give_the_same_bytes(tmp_path: Path, layouts: LayoutFactory, layout: str) -> None:
    model, placement = layouts.checkpoint("llama", shards=2)
    for name in ("a", "b"):
        relayout(model, placement, tmp_path / name, layout=layout)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_order_of_tensors_in_the_source_changes_nothing_but_the_kept_header(tmp_path: Path) -> None:
    made: list[Made] = []
    factory = LayoutFactory(tmp_path)
    for tensors in (tensors_of("opt"), dict(reversed(tensors_of("opt").items()))):
        model, placement = factory.checkpoint()
        (model / "model.safetensors").write_bytes(encode(tensors))
        output = tmp_path / str(len(made))
        relayout(model, placement, output)
        made.append(Made(model, placement, output))
    one, two = (Runtime(each.layout) for each in made)
    for block_id, block in one.blocks.items():
        other = two.blocks[block_id]
        assert one.range(block["bundles"]) == two.range(other["bundles"])
        assert one.order(block) == two.order(other)


def test_a_model_without_a_card_gets_one(layouts: LayoutFactory) -> None:
    made = layouts.bundled(readme=None)
    assert (made.layout / "README.md").read_text().startswith("## Neuron order\n")
    assert {stored["name"] for stored in Runtime(made.layout).index["sources"]} == {"model.safetensors"}


@pytest.mark.parametrize("layout", ["bundled", "permuted"])
def test_the_card_of_the_source_comes_first(layouts: LayoutFactory, layout: str) -> None:
    made = layouts.of_kind(layout)
    card = (made.layout / "README.md").read_bytes()
    assert card.startswith(README + b"\n## Neuron order\n")
    text = card.decode()
    assert f"(`--layout {layout}`)" in text
    assert "- Calibrated on: text (500 tokens)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["", "---", "layers.0", "layers.1", "text", "total"]
    assert len({row.count("|") for row in rows}) == 1
