from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.layout.index import PERMUTED_SCHEMA
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import (
    ELEMENT_BYTES,
    FAMILIES,
    HIDDEN,
    LAYERS,
    NEURONS,
    RawTensor,
    decode,
    deserialize,
    files_of,
    tensors_of,
)
from tests.layouts import LayoutFactory

# By the end of the name: the axis of the neurons.
AXES = {
    "fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1,
    "gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1,
    "c_fc.weight": 1, "c_fc.bias": 0, "c_proj.weight": 0,
    "intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "output.dense.weight": 1,
}  # fmt: skip


def expected(name: str, tensor: RawTensor, placement: Placement) -> RawTensor:
    """A tensor as the layout must hold it."""
    axis = next((axis for end, axis in AXES.items() if name.endswith("." + end)), None)
    if axis is None:
        return tensor
    layer = next(step for step in name.split(".") if step.isdigit())
    elements = np.frombuffer(tensor.data, dtype=np.uint8).reshape(*tensor.shape, ELEMENT_BYTES[tensor.dtype])
    moved = np.take(elements, placement.blocks[f"layers.{layer}"].order, axis=axis)
    return RawTensor(tensor.dtype, tensor.shape, moved.tobytes())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "F32") for family in FAMILIES), ("llama", "BF16"), ("gpt2", "F8_E4M3")]
)
def test_only_the_order_of_the_neurons_differs(layouts: LayoutFactory, family: str, dtype: str, shards: int) -> None:
    made = layouts.permuted(family, dtype=dtype, shards=shards)
    source, layout = files_of(made.model), files_of(made.layout)
    weights = [name for name in source if name.endswith(".safetensors")]
    assert len(weights) == shards
    moved = 0
    with Placement(made.placement) as placement:
        for name in weights:
            assert len(layout[name]) == len(source[name])
            data_start = 8 + int.from_bytes(source[name][:8], "little")
            assert layout[name][:data_start] == source[name][:data_start]
            found = {n: bytes(t["data"]) for n, t in deserialize(layout[name])}
            before = decode(made.model / name)
            assert set(found) == set(before)
            for tensor, content in before.items():
                assert found[tensor] == expected(tensor, content, placement).data
                moved += found[tensor] != content.data
    biases = 0 if family == "llama" else 1
    assert moved == 2 * (biases + (3 if family == "llama" else 2))
    for name in set(source) - set(weights) - {"README.md"}:
        assert layout[name] == source[name]
    assert set(layout) - set(source) == {
        "model.permuted.json", "neuralink/placement.safetensors", "neuralink/original/README.md"
    }  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2])
def test_it_is_an_ordinary_checkpoint(layouts: LayoutFactory, shards: int) -> None:
    made = layouts.permuted(shards=shards)
    with Checkpoint(made.layout) as checkpoint, Checkpoint(made.model) as source:
        assert checkpoint.config == source.config
        assert checkpoint.sharded == source.sharded
        assert set(checkpoint.tensors) == set(tensors_of("opt"))
        assert checkpoint.fingerprint != source.fingerprint


@pytest.mark.parametrize("shards", [1, 2])
def test_the_index_says_what_was_done(layouts: LayoutFactory, shards: int) -> None:
    made = layouts.permuted("gpt2", shards=shards)
    index = json.loads((made.layout / "model.permuted.json").read_text())
    jsonschema.Draft202012Validator(PERMUTED_SCHEMA.read()).validate(index)
    content = files_of(made.layout)
    assert {file["name"]: (file["bytes"], file["sha256"]) for file in index["files"]} == {
        name: (len(data), hashlib.sha256(data).hexdigest())
        for name, data in content.items()
        if name.startswith("model") and name.endswith(".safetensors")
    }
    assert content["neuralink/placement.safetensors"] == made.placement.read_bytes()
    assert content["neuralink/original/README.md"] == (made.model / "README.md").read_bytes()
    neurons, hidden = 4 * NEURONS, 4 * HIDDEN
    for k, block in enumerate(index["blocks"]):
        stem = f"transformer.h.{k}.mlp."
        assert [tuple(region.values()) for region in block["regions"]] == [
            (f"{stem}c_fc.weight", 1, 0, neurons, HIDDEN, neurons),
            (f"{stem}c_proj.weight", 0, 0, hidden, NEURONS, hidden),
            (f"{stem}c_fc.bias", 0, 0, 4, NEURONS, 4),
        ]
    with Checkpoint(made.model) as checkpoint:
        assert index["model"]["fingerprint"] == checkpoint.fingerprint


def test_without_a_card_there_is_none_to_keep(layouts: LayoutFactory) -> None:
    made = layouts.permuted(readme=None)
    assert not (made.layout / "neuralink/original").exists()
    assert (made.layout / "README.md").read_text().startswith("## Neuron order\n")


def test_a_permuted_model_can_be_laid_out_again(tmp_path: Path, layouts: LayoutFactory) -> None:
    """It is a checkpoint like any other, so that `relayout` takes it as one."""
    from tests.checkpoints import write_random_placement
    from tests.layouts import relayout, verify

    made = layouts.permuted("llama")
    placement = write_random_placement(made.layout, tmp_path / "placement", seed=5)
    relayout(made.layout, placement, tmp_path / "out")
    assert verify(made.layout, tmp_path / "out").mode == "full"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_one_number_wide(layouts: LayoutFactory, family: str) -> None:
    """Its matrices have one number per neuron, as biases have, and are still the matrices of its blocks."""
    from tests.layouts import verify

    made = layouts.permuted(family, hidden=1)
    report = verify(made.model, made.layout)
    assert report.coverage.covered_bytes == LAYERS * NEURONS * 4 * (3 if family == "llama" else 2)
    assert "100 %" in str(report.coverage)
