"""Layouts of gpt-oss, whose gate and up alternate: as numbers, and as MXFP4, which is carried through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from neuralink_cli.errors import UnsupportedError, VerificationError
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting.restore import loadable, restore
from neuralink_cli.streaming import pipeline
from tests.checkpoints import HIDDEN, NEURONS, RawTensor, decode, files_of, write_random_placement
from tests.layouts import LayoutFactory, relayout, verify
from tests.rewriting.test_rounded_layouts import REFERENCE, values_of
from tests.rewriting.test_scaled_sources import change
from tests.scaled import mxfp4_gpt_oss

STEM = "model.layers.1.mlp.experts."
BLOCK = "layers.1.experts.2"
EXPERT, WIDTH, ROWS = 2, 64, 96
Bytes = npt.NDArray[np.uint8]


def parts_of(layout: Path) -> tuple[dict[str, Bytes], npt.NDArray[np.int32], Any]:
    """The bytes of each part of a block `[n, bytes]` by role, bundled or resident, the order, and its index."""
    with BundledLayout(layout) as opened:
        block = next(block for block in opened.index.blocks if block.id == BLOCK)
        bundles = opened.file.read(block.bundles.tensor).reshape(block.neurons, -1)
        found = {part.role: bundles[:, part.offset : part.offset + part.bytes].copy() for part in block.parts}
        for kept in block.resident:
            name = kept.role if kept.kind == "rows" else f"{kept.role} {kept.kind}"
            found[name] = opened.file.read(kept.place.tensor).reshape(kept.place.shape[0], -1).copy()
        return found, opened.order(BLOCK), block


@pytest.mark.parametrize(("resident", "weights"), [("none", "down=q8_0"), ("gate", "gate=mxfp4,up=mxfp4,down=q4_0")])
def test_mxfp4_is_carried_through_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: str, weights: str
) -> None:
    # Several stretches for each part.
    monkeypatch.setattr(pipeline, "PIECE", 50 * WIDTH)
    _, model, values = mxfp4_gpt_oss(tmp_path)
    placement = write_random_placement(model, tmp_path / "placement", seed=1)
    relayout(model, placement, tmp_path / "layout", weights=weights, resident=resident)
    found, order, block = parts_of(tmp_path / "layout")
    with TensorFile(model / "model.safetensors") as file:
        packed = file.read(f"{STEM}gate_up_proj_blocks").reshape(4, 2 * ROWS, 2, 16)[EXPERT]
        scales = file.read(f"{STEM}gate_up_proj_scales").reshape(4, 2 * ROWS, 2, 1)[EXPERT]
        bias = file.read(f"{STEM}gate_up_proj_bias").reshape(4, 2 * ROWS, 2)[EXPERT]
    codes = np.stack([packed & 15, packed >> 4], axis=3).reshape(2 * ROWS, 2, 32)
    expected = np.concatenate([scales, codes[..., :16] | codes[..., 16:] << 4], axis=2).reshape(2 * ROWS, -1)
    for first, role in enumerate(("gate", "up")):
        assert found[role].shape[1] == WIDTH // 32 * 17
        assert np.array_equal(found[role], expected[first::2][order])
        decoded = gguf.quants.dequantize(found[role], gguf.GGMLQuantizationType.MXFP4)
        assert np.array_equal(decoded, values[f"{STEM}gate_up_proj_blocks"][EXPERT, first::2][order])
        assert np.array_equal(found[f"{role} bias"], bias[first::2][order])
    kind = weights[-4:]
    columns = np.ascontiguousarray(values[f"{STEM}down_proj_blocks"][EXPERT].T[order])
    assert np.array_equal(found["down"], gguf.quants.quantize(columns, REFERENCE[kind]))
    assert (block.activation, block.up_values.limit, block.up_values.plus) == ("at_most(7) swish(1.702)", 7, 1)
    assert verify(model, tmp_path / "layout").mode == "full"
    with pytest.raises(UnsupportedError, match="rounded weights"):
        restore(tmp_path / "layout", tmp_path / "restored")
    # A code that the fingerprint, which is of samples, does not see.
    change(model / "model.safetensors", f"{STEM}gate_up_proj_blocks", 5_000)
    with pytest.raises(VerificationError, match=r"is not what .*gate_up_proj_blocks' of the source gives as mxfp4"):
        verify(model, tmp_path / "layout")


def test_the_decoded_checkpoint_is_what_transformers_makes_of_the_source(tmp_path: Path) -> None:
    """All but down, which is rounded."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    _, model, values = mxfp4_gpt_oss(tmp_path)
    placement = write_random_placement(model, tmp_path / "placement", seed=1)
    relayout(model, placement, tmp_path / "layout", weights="down=q8_0", dense_weights="source")
    options = {"dtype": "float32", "quantization_config": Mxfp4Config(dequantize=True)}
    source = AutoModelForCausalLM.from_pretrained(model, **options)
    with loadable(tmp_path / "layout") as folder:
        decoded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        assert "quantization_config" not in (folder / "config.json").read_text()
        with safe_open(folder / "model.safetensors", "np") as file:
            turned = file.get_tensor(f"{STEM}gate_up_proj")
            assert not any("_blocks" in name or "_scales" in name for name in file.keys())  # noqa: SIM118
    assert np.array_equal(turned, values[f"{STEM}gate_up_proj_blocks"].transpose(0, 2, 1))
    for (name, ours), (other, theirs) in zip(decoded.named_parameters(), source.named_parameters(), strict=True):
        assert name == other
        if name.endswith("experts.down_proj"):
            assert 0 < (ours - theirs).abs().max() < 0.02
        else:
            assert (ours == theirs).all(), name


def test_what_mxfp4_cannot_be(tmp_path: Path) -> None:
    plain, model, _ = mxfp4_gpt_oss(tmp_path)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (model, {}, "its weights are quantised"),
        (model, {"weights": "mxfp4"}, "blocks of the down weights run across neurons"),
        (model, {"layout": "permuted"}, "has quantised weights, whose scales"),
        (plain, {"weights": "gate=mxfp4"}, "the gate weights are not MXFP4"),
    ]
    for k, (source, options, told) in enumerate(cases):
        placement = write_random_placement(source, tmp_path / f"placement-{k}")
        with pytest.raises(UnsupportedError, match=told):
            relayout(source, placement, tmp_path / "out", **options)


@pytest.mark.parametrize("weights", ["q8_0", "gate=q4_0,down=q8_0"])
def test_alternating_columns_are_rounded_as_ggml_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr(pipeline, "PIECE", 50 * WIDTH)
    plain, _, _ = mxfp4_gpt_oss(tmp_path)
    placement = write_random_placement(plain, tmp_path / "placement", seed=1)
    relayout(plain, placement, tmp_path / "layout", weights=weights)
    found, order, _ = parts_of(tmp_path / "layout")
    source = decode(plain / "model.safetensors")
    both = values_of(source[f"{STEM}gate_up_proj"])[EXPERT]
    parts = {"gate": both[:, 0::2].T, "up": both[:, 1::2].T, "down": values_of(source[f"{STEM}down_proj"])[EXPERT]}
    formats = dict.fromkeys(parts, weights) if "=" not in weights else dict(w.split("=") for w in weights.split(","))
    for role, part in parts.items():
        if role in formats:
            expected = gguf.quants.quantize(np.ascontiguousarray(part[order]), REFERENCE[formats[role]])
            assert np.array_equal(found[role], expected), role
        else:
            words = found[role].view(np.uint16).astype(np.uint32) << 16
            assert np.array_equal(words.view(np.float32), part[order])
    assert verify(plain, tmp_path / "layout").mode == "full"
    with loadable(tmp_path / "layout") as folder:
        decoded = values_of(decode(folder / "model.safetensors")[f"{STEM}gate_up_proj"])
    kind = REFERENCE[formats["gate"]]
    back = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(both[:, 0::2].T), kind), kind)
    assert np.array_equal(decoded[EXPERT][:, 0::2], back.T)


def elements(tensor: RawTensor) -> npt.NDArray[np.uint32]:
    return np.frombuffer(tensor.data, np.uint32).reshape(tensor.shape)


def test_a_permuted_layout_moves_pairs(layouts: LayoutFactory, tmp_path: Path) -> None:
    made = layouts.permuted("gpt_oss")
    before, after = decode(made.model / "model.safetensors"), decode(made.layout / "model.safetensors")
    with Placement(made.placement) as placement:
        for layer in range(2):
            stem = f"model.layers.{layer}.mlp.experts."
            for expert in range(2):
                order = placement.blocks[f"layers.{layer}.experts.{expert}"].order
                names = (f"{stem}gate_up_proj", f"{stem}gate_up_proj_bias", f"{stem}down_proj", f"{stem}down_proj_bias")
                (both, bias, down, out), found = (
                    [elements(tensors[name])[expert] for name in names] for tensors in (before, after)
                )
                pairs = both.reshape(HIDDEN, NEURONS, 2)[:, order].reshape(HIDDEN, -1)
                expected = (pairs, bias.reshape(NEURONS, 2)[order].reshape(-1), down[order], out)
                assert all(map(np.array_equal, found, expected))
    restore(made.layout, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(made.model)


@pytest.mark.parametrize("resident", ["none", "gate"])
def test_a_bundled_layout_gives_the_checkpoint_back(layouts: LayoutFactory, tmp_path: Path, resident: str) -> None:
    made = layouts.bundled("gpt_oss", resident=resident)
    assert verify(made.model, made.layout).mode == "full"
    restore(made.layout, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(made.model)


def test_a_changed_column_is_found_with_its_neuron(layouts: LayoutFactory, tmp_path: Path) -> None:
    made = layouts.bundled("gpt_oss", neurons=64)
    copy = tmp_path / "model"
    copy.mkdir()
    for name, content in files_of(made.model).items():
        (copy / name).write_bytes(content)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    # The up weight of neuron 31 in line 9 of the second expert, which no sample of the fingerprint is of.
    place = 4 * (HIDDEN * 128 + 9 * 128 + 2 * 31 + 1)
    change(copy / "model.safetensors", name, place)
    told = rf"'{name}' differs from the source at byte {place}: layers\.0\.experts\.1, neuron 31, slot"
    with pytest.raises(VerificationError, match=told):
        verify(copy, made.layout)
