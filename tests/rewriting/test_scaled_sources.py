"""Layouts of checkpoints that come quantised to eight or four bits: their weights are rounded to formats of ggml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from neuralink_cli.errors import OptionError, UnsupportedError, VerificationError
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting.restore import loadable, restore
from neuralink_cli.storage.reader import FlashReader
from neuralink_cli.streaming import pipeline
from tests.checkpoints import decode, write_random_placement
from tests.layouts import relayout, verify
from tests.rewriting.test_rounded_layouts import REFERENCE, values_of
from tests.scaled import FP8, INT8, MXFP4, PACKED4, PACKED8, quantised_copy

MODEL = Path(__file__).parent.parent.parent / "examples/tiny-relu"
LAYER = "model.decoder.layers.1"


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@pytest.mark.parametrize(
    ("kind", "block"),
    [
        (FP8, (128, 128)),
        (FP8, (48, 80)),
        (INT8, (0, 0)),
        (PACKED4, (1, 32)),
        (PACKED4, (1, 1 << 20)),
        (PACKED8, (1, 64)),
        (MXFP4, (1, 32)),
    ],
)
def test_weights_are_rounded_from_what_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: tuple[int, int], weights: str
) -> None:
    # In stretches that begin in the middle of blocks of scales.
    monkeypatch.setattr(pipeline, "PIECE", 50 * 768)
    values = quantised_copy(MODEL, tmp_path / "model", kind, block)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement", seed=1)
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights=weights, dense_weights=weights)
    with open_layout(tmp_path / "layout") as opened:
        order = opened.order("layers.1")
    rows = [values[f"{LAYER}.fc1.weight"][order], values[f"{LAYER}.fc2.weight"].T[order]]
    expected = [gguf.quants.quantize(np.ascontiguousarray(part), REFERENCE[weights]) for part in rows]
    with FlashReader(tmp_path / "layout") as reader:
        found = reader.read_bundles(reader.block("layers.1"), np.arange(order.size)).bundles
    assert np.array_equal(found, np.concatenate(expected, axis=1))
    with TensorFile(tmp_path / "layout/model.flash.safetensors") as file:
        name = f"{LAYER}.self_attn.q_proj.weight"
        attention = gguf.quants.quantize(values[name], REFERENCE[weights])
        assert np.array_equal(file.read(name).reshape(attention.shape), attention)
    assert verify(tmp_path / "model", tmp_path / "layout").mode == "full"
    with loadable(tmp_path / "layout") as folder:
        decoded = decode(folder / "model.safetensors")
        assert "quantization_config" not in (folder / "config.json").read_text()
    assert not any("weight_" in name for name in decoded)
    dense = gguf.quants.dequantize(attention, REFERENCE[weights])
    assert np.array_equal(values_of(decoded[name]), dense)


@pytest.mark.parametrize("kind", [FP8, INT8, PACKED4, MXFP4])
def test_what_needs_scales_cannot_stay_as_it_is(tmp_path: Path, kind: str) -> None:
    quantised_copy(MODEL, tmp_path / "model", kind)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "layers.0: its weights are quantised"),
        # MXFP4 may stay so in rows, but not in the columns of down.
        ({"weights": "up=q4_0"}, "layers.0: its weights are quantised"),
        ({"weights": "q4_0", "dense_weights": "source"}, "self_attn.k_proj.weight: its weights are quantised"),
        ({"layout": "permuted"}, "has quantised weights, whose scales"),
    ]
    for options, told in cases:
        with pytest.raises(UnsupportedError, match=told):
            relayout(tmp_path / "model", placement, tmp_path / "out", **options)
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights="q4_0")
    with pytest.raises(UnsupportedError, match="rounded weights"):
        restore(tmp_path / "layout", tmp_path / "restored")


@pytest.mark.parametrize(
    ("resident", "weights"), [("none", "up=mxfp4,down=q4_0"), ("gate", "up=mxfp4,down=q4_0"), ("none", "down=q8_0")]
)
def test_mxfp4_is_carried_through_as_ggml_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: str, weights: str
) -> None:
    monkeypatch.setattr(pipeline, "PIECE", 50 * 64)
    values = quantised_copy(MODEL, tmp_path / "model", MXFP4)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement", seed=1)
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights=weights, resident=resident)
    with BundledLayout(tmp_path / "layout") as opened:
        order = opened.order("layers.1")
        block = next(block for block in opened.index.blocks if block.id == "layers.1")
        rows = opened.file.read(block.resident[0].place.tensor if resident == "gate" else block.bundles.tensor)
        rows = rows.reshape(order.size, -1)[:, : 128 // 32 * 17]
    assert np.array_equal(
        gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4), values[f"{LAYER}.fc1.weight"][order]
    )
    # Bit by bit: a byte of the scale, then weights 16 apart in a byte.
    with TensorFile(tmp_path / "model/model.safetensors") as file:
        packed = file.read(f"{LAYER}.fc1.weight_packed").reshape(768, 4, 16)
        scales = file.read(f"{LAYER}.fc1.weight_scale").reshape(768, 4, 1)
    codes = np.stack([packed & 15, packed >> 4], axis=3).reshape(768, 4, 32)
    expected = np.concatenate([scales, codes[..., :16] | codes[..., 16:] << 4], axis=2).reshape(768, -1)
    assert np.array_equal(rows, expected[order])
    assert verify(tmp_path / "model", tmp_path / "layout").mode == "full"
    with loadable(tmp_path / "layout") as folder:
        assert np.array_equal(
            values_of(decode(folder / "model.safetensors")[f"{LAYER}.fc1.weight"]), values[f"{LAYER}.fc1.weight"]
        )
    change(tmp_path / "model/model.safetensors", f"{LAYER}.fc1.weight_packed", 10_000)
    with pytest.raises(VerificationError, match=r"is not what .*fc1\.weight' of the source gives as mxfp4"):
        verify(tmp_path / "model", tmp_path / "layout")


def test_mxfp4_is_made_of_nothing_else(tmp_path: Path) -> None:
    for kind in (MXFP4, PACKED4):
        quantised_copy(MODEL, tmp_path / kind, kind)
    cases: list[tuple[Path, str, type[Exception], str]] = [
        (tmp_path / MXFP4, "mxfp4", UnsupportedError, "blocks of the down weights run across neurons"),
        (tmp_path / PACKED4, "up=mxfp4,down=q4_0", UnsupportedError, "the up weights are not MXFP4"),
        (MODEL, "up=mxfp4,down=q4_0", UnsupportedError, "the up weights are not MXFP4.* as up=q8_0"),
    ]
    for model, weights, error, told in cases:
        placement = write_random_placement(model, tmp_path / f"placement-{model.name}-{len(weights)}")
        with pytest.raises(error, match=told):
            relayout(model, placement, tmp_path / "out", weights=weights)
    placement = write_random_placement(tmp_path / MXFP4, tmp_path / "placement")
    with pytest.raises(OptionError, match="'mxfp4' is not a format to round to"):
        relayout(tmp_path / MXFP4, placement, tmp_path / "out", weights="q8_0", dense_weights="mxfp4")


def test_a_scale_of_mxfp4_that_is_no_number_is_refused(tmp_path: Path) -> None:
    quantised_copy(MODEL, tmp_path / "model", MXFP4)
    with TensorFile(tmp_path / "model/model.safetensors") as file:
        offset = file.header.offset_of(file.entry(f"{LAYER}.fc1.weight_scale"))
    content = bytearray((tmp_path / "model/model.safetensors").read_bytes())
    content[offset + 4 * 700 + 2] = 255
    (tmp_path / "model/model.safetensors").write_bytes(content)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement")
    for weights in ("up=mxfp4,down=q4_0", "q8_0"):
        with pytest.raises(UnsupportedError, match=r"weights of neuron 700 \(64 to 95\) are NaN or infinite"):
            relayout(tmp_path / "model", placement, tmp_path / "out", weights=weights)


@pytest.mark.parametrize(("kind", "last"), [(FP8, "scale_inv"), (PACKED4, "scale")])
def test_a_changed_scale_is_found(tmp_path: Path, kind: str, last: str) -> None:
    quantised_copy(MODEL, tmp_path / "model", kind)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement")
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights="q4_0")
    name = f"{LAYER}.fc1.weight_{last}"
    change(tmp_path / "layout/model.flash.safetensors", name, 0)
    with pytest.raises(VerificationError, match=f"'{name}' differs"):
        verify(tmp_path / "model", tmp_path / "layout")


def test_a_changed_packed_code_is_found(tmp_path: Path) -> None:
    quantised_copy(MODEL, tmp_path / "model", PACKED4, (1, 32))
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement")
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights="q8_0")
    weights, flash = tmp_path / "model/model.safetensors", tmp_path / "layout/model.flash.safetensors"
    # A place that the fingerprint, which is of samples, does not see.
    change(weights, f"{LAYER}.fc1.weight_packed", 10_000)
    with pytest.raises(VerificationError, match=f"is not what '{LAYER}.fc1.weight' of the source gives as q8_0"):
        verify(tmp_path / "model", tmp_path / "layout")
    change(weights, f"{LAYER}.fc1.weight_packed", 10_000)
    change(flash, f"{LAYER}.self_attn.q_proj.weight", 1_000)
    with pytest.raises(VerificationError, match=r"q_proj\.weight' is not what the source gives as q8_0: row 7"):
        verify(tmp_path / "model", tmp_path / "layout")


def test_a_changed_shape_of_packed_weights_is_found(tmp_path: Path) -> None:
    quantised_copy(MODEL, tmp_path / "model", PACKED4, (1, 32))
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement")
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights="q8_0")
    change(tmp_path / "layout/model.flash.safetensors", f"{LAYER}.fc1.weight_shape", 0)
    with pytest.raises(UnsupportedError, match=r"fc1\.weight_packed' is I32"):
        open_layout(tmp_path / "layout")


def change(path: Path, tensor: str, byte: int) -> None:
    """Turn over a bit of a tensor in a file."""
    with TensorFile(path) as file:
        offset = file.header.offset_of(file.entry(tensor)) + byte
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
