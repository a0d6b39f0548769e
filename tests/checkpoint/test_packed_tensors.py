"""Which weights are packed codes, what they are seen as, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.packed_tensors import PackedTensor, as_unpacked, find_packed_tensors, shapes_of
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor, Shape
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import build_header
from neuralink_cli.files.tensor_file import TensorFile
from tests.scaled import PACKED4, quantised_copy

MODEL = Path(__file__).parent.parent.parent / "examples/tiny-relu"
HERE = Path("model")
CODES, SHAPE = "a.proj.weight_packed", "a.proj.weight_shape"
CONFIG = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def with_group(**weights: Any) -> dict[str, Any]:
    return {**CONFIG, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def found(config: Any, codes: Shape, stated: tuple[int, int], kind: str = "I64") -> dict[str, PackedTensor]:
    dtype = {"I64": "<i8", "I32": "<i4"}.get(kind, "<i8")
    tensors = {CODES: codes, SHAPE: (kind, (2,))}
    return find_packed_tensors(config, tensors, lambda _: np.array(stated, dtype).view(np.uint8), HERE)


@pytest.mark.parametrize(
    ("config", "words", "kind", "bits"),
    [
        (CONFIG, 8, "I64", 4),
        (CONFIG, 16, "I32", 8),
        (with_group(num_bits=4, symmetric=True), 8, "I64", 4),
        (with_group(num_bits=8), 16, "I64", 8),
    ],
)
def test_bits_follow_from_the_shapes(config: dict[str, Any], words: int, kind: str, bits: int) -> None:
    expected = PackedTensor("a.proj.weight", CODES, SHAPE, 40, 64, bits)
    assert found(config, ("I32", (40, words)), (40, 64), kind) == {"a.proj.weight": expected}


@pytest.mark.parametrize(
    ("config", "codes", "stated", "kind"),
    [
        # 60 columns do not fill words, those of 2 bits are not understood, nor those of 8 where the config says 4.
        (CONFIG, ("I32", (40, 8)), (40, 60), "I64"),
        (CONFIG, ("I32", (40, 4)), (40, 64), "I64"),
        (with_group(num_bits=4), ("I32", (40, 16)), (40, 64), "I64"),
        (with_group(num_bits=[4]), ("I32", (40, 8)), (40, 64), "I64"),
        (CONFIG, ("I32", (40, 8)), (41, 64), "I64"),
        (CONFIG, ("I32", (0, 8)), (0, 64), "I64"),
        (CONFIG, ("U8", (40, 8)), (40, 64), "I64"),
        (CONFIG, ("I32", (2, 40, 8)), (40, 64), "I64"),
        (CONFIG, ("I32", (40, 8)), (40, 64), "F32"),
    ],
)
def test_other_shapes_are_refused(config: dict[str, Any], codes: Shape, stated: tuple[int, int], kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{CODES}' is {codes[0]}.*not understood as codes of 4 or 8 bits"):
        found(config, codes, stated, kind)


def test_mxfp4_needs_no_shape() -> None:
    config = {**CONFIG, "format": "mxfp4-pack-quantized"}
    packed = find_packed_tensors(config, {CODES: ("U8", (40, 32))}, lambda _: np.zeros(0, np.uint8), HERE)
    assert packed == {"a.proj.weight": PackedTensor("a.proj.weight", CODES, None, 40, 64, 4, floats=True)}
    assert shapes_of(packed) == set()
    for codes in (("U8", (40, 24)), ("I32", (40, 8)), ("U8", (2, 40, 32))):
        with pytest.raises(UnsupportedError, match="nor as MXFP4"):
            find_packed_tensors(config, {CODES: codes}, lambda _: np.zeros(0, np.uint8), HERE)
    with pytest.raises(UnsupportedError, match=f"'{CODES}' is U8"):
        found(CONFIG, ("U8", (40, 32)), (40, 64))


def test_zero_points_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="only symmetric ones"):
        found(with_group(num_bits=4, symmetric=False), ("I32", (40, 8)), (40, 64))


def test_other_kinds_are_not_looked_at() -> None:
    for config in (None, {"quant_method": "gptq"}, {**CONFIG, "format": "int-quantized"}):
        assert found(config, ("I32", (40, 8)), (40, 64)) == {}


def test_entries_keep_where_they_start() -> None:
    header = build_header([("a.bias", "F32", (4,)), (CODES, "I32", (40, 8)), (SHAPE, "I64", (2,))], {})
    tensor = PackedTensor("a.proj.weight", CODES, SHAPE, 40, 64, 4)
    bias, weight, shape = as_unpacked(header.entries, {tensor.name: tensor})
    assert (bias, shape) == (header.entries[0], header.entries[2])
    assert (weight.name, weight.dtype, weight.shape, weight.nbytes) == (tensor.name, "I8", (40, 64), 40 * 64)
    assert weight.start == header.entries[1].start


def test_a_checkpoint_shows_packed_weights_unpacked(tmp_path: Path) -> None:
    quantised_copy(MODEL, tmp_path / "model", PACKED4, (1, 32))
    name = "model.decoder.layers.1.fc1.weight"
    with Checkpoint(tmp_path / "model") as checkpoint, TensorFile(tmp_path / "model/model.safetensors") as file:
        assert f"{name}_packed" not in checkpoint
        entry = checkpoint.place(name).entry
        assert (entry.dtype, entry.shape) == ("I8", (768, 128))
        assert checkpoint.scaled[name] == ScaledTensor(name, f"{name}_scale", 768, 128, 1, 32)
        # Codes 301 to 304 of the matrix, which begin and end in the middle of a byte.
        wanted = checkpoint.place(name).stretch(301, 304)
        read = np.empty(wanted.size, np.uint8)
        wanted.file.read_at(wanted.offset, read)
        assert np.array_equal(read, file.read(f"{name}_packed", 150, 152))
        assert checkpoint.total_bytes == file.header.data_bytes


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"weight_zero_point": torch.zeros(1, 4, dtype=torch.int32)}, "weight_zero_point' holds zero points"),
        ({"weight_g_idx": torch.zeros(128, dtype=torch.int32)}, "weight_g_idx' says which group .*activation order"),
        ({"weight": torch.zeros(768, 128)}, "weight_packed' is I32"),
        ({"weight_shape": None}, "weight_packed' is I32"),
        ({"weight_scale": None}, "weight' is I8, but has no scales"),
    ],
)
def test_what_lies_beside_packed_weights_is_checked(tmp_path: Path, beside: dict[str, Any], told: str) -> None:
    quantised_copy(MODEL, tmp_path / "model", PACKED4, (1, 32))
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    for last, tensor in beside.items():
        tensors.pop(f"model.decoder.layers.1.fc1.{last}", None)
        if tensor is not None:
            tensors[f"model.decoder.layers.1.fc1.{last}"] = tensor
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UnsupportedError, match=told):
        Checkpoint(tmp_path / "model")


def test_packed_weights_of_which_the_config_says_nothing_are_left_packed(tmp_path: Path) -> None:
    quantised_copy(MODEL, tmp_path / "model", PACKED4, (1, 32))
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with Checkpoint(tmp_path / "model") as checkpoint:
        assert "model.decoder.layers.1.fc1.weight_packed" in checkpoint
        assert not checkpoint.packed
