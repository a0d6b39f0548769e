"""Layouts whose weights are rounded to ggml's formats, against the reference implementation of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import OptionError, UnsupportedError, VerificationError
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting.comparison import Comparison
from neuralink_cli.rewriting.restore import restore
from neuralink_cli.storage.reader import FlashReader
from tests.checkpoints import RawTensor, decode, tensors_of, write_checkpoint, write_random_placement
from tests.layouts import relayout, verify

HIDDEN, NEURONS = 64, 37
# The reference reads F32; bytes are those of its class for each format.
REFERENCE = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
MIXED = "gate=q8_0,up=source,down=q4_0"


def finite(dtype: str, shape: tuple[int, ...], seed: int) -> RawTensor:
    """Normal weights in a dtype."""
    values = np.random.default_rng(seed).standard_normal(shape).astype("<f4")
    if dtype == "BF16":
        return RawTensor(dtype, shape, (values.view("<u4") >> 16).astype("<u2").tobytes())
    return RawTensor(dtype, shape, values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes())


def values_of(tensor: RawTensor) -> npt.NDArray[np.float32]:
    if tensor.dtype == "BF16":
        bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, {"F32": "<f4", "F16": "<f2"}[tensor.dtype]).astype("<f4").reshape(tensor.shape)


def checkpoint(folder: Path, family: str, dtype: str, **changed: RawTensor) -> tuple[Path, Path]:
    """A checkpoint of finite weights, and a placement for it."""
    shapes = tensors_of(family, dtype=dtype, hidden=HIDDEN)
    tensors = {
        name: finite(dtype, tensor.shape, seed) if tensor.dtype == dtype and len(tensor.shape) == 2 else tensor
        for seed, (name, tensor) in enumerate(shapes.items())
    }
    config = {"n_embd" if family == "gpt2" else "hidden_size": HIDDEN}
    model = write_checkpoint(folder / "model", family, tensors={**tensors, **changed}, config=config)
    return model, write_random_placement(model, folder / "placement", seed=1)


# Rows by role, whichever way the matrices lie.
ROLES: dict[str, dict[str, tuple[str, bool]]] = {
    "llama": {
        "gate": ("model.layers.0.mlp.gate_proj.weight", False),
        "up": ("model.layers.0.mlp.up_proj.weight", False),
        "down": ("model.layers.0.mlp.down_proj.weight", True),
    },
    "gpt2": {"up": ("transformer.h.0.mlp.c_fc.weight", True), "down": ("transformer.h.0.mlp.c_proj.weight", False)},
}


@pytest.mark.parametrize("weights", ["q8_0", "q4_0", MIXED])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "F16"), ("llama", "BF16"), ("gpt2", "F32")])
def test_bundles_are_those_of_the_reference(tmp_path: Path, family: str, dtype: str, weights: str) -> None:
    model, placement = checkpoint(tmp_path, family, dtype)
    if family == "gpt2":
        weights = weights.replace("gate=q8_0,", "")
    relayout(model, placement, tmp_path / "layout", weights=weights)
    formats = dict(each.split("=") for each in weights.split(",")) if "=" in weights else {}
    tensors = decode(model / "model.safetensors")
    with Placement(placement) as opened:
        order = opened.blocks["layers.0"].order
    expected = []
    for role, (name, transposed) in ROLES[family].items():
        rows = values_of(tensors[name]).T if transposed else values_of(tensors[name])
        kind = formats.get(role, "source" if formats else weights)
        if kind == "source":
            size = len(tensors[name].data) // rows.size
            data = np.frombuffer(tensors[name].data, f"<u{size}").reshape(tensors[name].shape)
            expected.append(np.ascontiguousarray((data.T if transposed else data)[order]).view(np.uint8))
        else:
            expected.append(gguf.quants.quantize(np.ascontiguousarray(rows[order]), REFERENCE[kind]))
    with FlashReader(tmp_path / "layout") as reader:
        block = reader.block("layers.0")
        found = reader.read_bundles(block, np.arange(block.neurons)).bundles
    assert np.array_equal(found, np.concatenate(expected, axis=1))
    assert verify(model, tmp_path / "layout").mode == "full"


@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize("weights", ["q8_0", "q4_0", "iq4_nl", MIXED])
def test_verify_finds_every_change(tmp_path: Path, weights: str, rounding: str) -> None:
    model, placement = checkpoint(tmp_path, "llama", "BF16")
    layout = tmp_path / "layout"
    relayout(model, placement, layout, weights=weights, rounding=rounding, resident="gate")
    verify(model, layout)
    with open_layout(layout) as opened:
        assert opened.kind == "bundled"
        blocks, order = opened.index.blocks, opened.order("layers.1")
        places = [blocks[1].bundles.offset + 5 * blocks[1].stride + 3, blocks[1].resident[0].place.offset + 3]
    flash = layout / "model.flash.safetensors"
    for place, told in zip(places, [f"neuron {order[5]}, slot 5", "slot 0"], strict=True):
        content = bytearray(flash.read_bytes())
        content[place] ^= 1
        flash.write_bytes(content)
        with pytest.raises(VerificationError, match=f"layers.1.*{told}"):
            verify(model, layout)
        content[place] ^= 1
        flash.write_bytes(content)
    verify(model, layout)


def test_another_model_of_the_same_shapes_is_found(tmp_path: Path) -> None:
    """A change too small to matter to the rounding is none; any that matters is found."""
    model, placement = checkpoint(tmp_path, "llama", "F32")
    relayout(model, placement, tmp_path / "layout", weights="q4_0")
    weights = model / "model.safetensors"
    tensors = decode(weights)
    name = ROLES["llama"]["up"][0]
    values = values_of(tensors[name]).copy()
    # In the middle of the tensor, which the fingerprint of a small tensor covers as a whole.
    values[7, 3] += 1
    changed = {**tensors, name: RawTensor("F32", values.shape, values.tobytes())}
    other, _ = checkpoint(tmp_path / "other", "llama", "F32", **changed)
    with pytest.raises(Exception, match="fingerprint"):
        verify(other, tmp_path / "layout")


def test_the_index_says_what_is_rounded_and_nothing_of_it_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, placement = checkpoint(tmp_path, "llama", "F16")
    relayout(model, placement, tmp_path / "plain", resident="gate")
    caplog.set_level("INFO", "neuralink_cli")
    relayout(model, placement, tmp_path / "mixed", weights=MIXED, resident="gate", rounding="search")
    assert f"`cluster --resident gate --weights {MIXED}` makes it for them" in caplog.text
    plain, mixed = (json.loads((tmp_path / name / "model.flash.json").read_text()) for name in ("plain", "mixed"))
    assert "rounding" not in plain
    assert mixed["rounding"] == "search"
    stored: list[dict[str, Any]] = [*mixed["blocks"][0]["parts"], *mixed["blocks"][0]["resident"]]
    assert {each["role"]: each.get("weights") for each in stored} == {"gate": "q8_0", "up": None, "down": "q4_0"}
    assert mixed["blocks"][0]["bundles"]["dtype"] == "U8"
    assert mixed["blocks"][0]["stride"] == 2 * HIDDEN + HIDDEN // 32 * 18
    assert not any("weights" in each for each in (*plain["blocks"][0]["parts"], *plain["blocks"][0]["resident"]))


def test_the_source_cannot_be_had_again(tmp_path: Path) -> None:
    model, placement = checkpoint(tmp_path, "llama", "F16")
    relayout(model, placement, tmp_path / "layout", weights="q8_0")
    with pytest.raises(UnsupportedError, match="rounded weights"):
        restore(tmp_path / "layout", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_what_cannot_be_rounded(tmp_path: Path) -> None:
    wide = finite("F32", (NEURONS, HIDDEN), 0)
    values = values_of(wide).copy()
    values[11, 40] = np.nan
    name = ROLES["llama"]["up"][0]
    bad = {name: RawTensor("F32", values.shape, values.tobytes())}
    model, placement = checkpoint(tmp_path / "nan", "llama", "F32", **bad)
    with pytest.raises(UnsupportedError, match=rf"{name}.*neuron 11 \(32 to 63\) are NaN"):
        relayout(model, placement, tmp_path / "out", weights="q4_0")
    narrow = write_checkpoint(tmp_path / "narrow", "llama")
    odd = write_random_placement(narrow, tmp_path / "odd")
    with pytest.raises(UnsupportedError, match="not a multiple of 32"):
        relayout(narrow, odd, tmp_path / "out", weights="q4_0")
    eight = write_checkpoint(
        tmp_path / "eight", "llama", dtype="F8_E4M3", hidden=HIDDEN, config={"hidden_size": HIDDEN}
    )
    with pytest.raises(UnsupportedError, match="dtype F8_E4M3"):
        relayout(eight, write_random_placement(eight, tmp_path / "e"), tmp_path / "out", weights="q4_0")
    with pytest.raises(OptionError, match="permuted"):
        relayout(model, placement, tmp_path / "out", weights="q4_0", layout="permuted")
    thin = tensors_of("llama", hidden=32)
    small = write_checkpoint(tmp_path / "small", "llama", tensors=thin, config={"hidden_size": 32})
    with pytest.raises(UnsupportedError, match="whole elements"):
        relayout(small, write_random_placement(small, tmp_path / "s"), tmp_path / "out", weights="gate=q4_0")
    gpt2, order = checkpoint(tmp_path / "gpt2", "gpt2", "F32")
    with pytest.raises(OptionError, match="blocks have no gate"):
        relayout(gpt2, order, tmp_path / "out", weights="gate=q8_0,up=q4_0,down=q4_0")
    with pytest.raises(OptionError, match="unknown weight format"):
        relayout(model, placement, tmp_path / "out", weights="q5_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [("model.layers.0.mlp.up_proj.weight", "weights of neuron 7"), ("model.embed_tokens.weight", "weights of row 7")],
)
def test_a_source_that_cannot_be_rounded_is_not_that_of_the_layout(tmp_path: Path, name: str, told: str) -> None:
    model, placement = checkpoint(tmp_path, "llama", "F32")
    relayout(model, placement, tmp_path / "layout", weights="q4_0", dense_weights="q8_0")
    tensors = decode(model / "model.safetensors")
    values = values_of(tensors[name]).copy()
    values[7, 3] = np.nan
    other, _ = checkpoint(
        tmp_path / "other", "llama", "F32", **{name: RawTensor("F32", values.shape, values.tobytes())}
    )
    # The fingerprint, which only samples larger tensors, is not looked at here.
    told = f"is not what the source gives: in {name}.*{told}"
    with (
        Checkpoint(other) as source,
        open_layout(tmp_path / "layout") as layout,
        pytest.raises(VerificationError, match=told),
    ):
        Comparison(layout, source).run()
