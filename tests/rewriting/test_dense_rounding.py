"""Layouts whose tensors outside the blocks are rounded too, against the reference implementation of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from neuralink_cli.errors import NeuralinkError, OptionError, UnsupportedError, VerificationError
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting.restore import loadable, restore
from neuralink_cli.streaming import pipeline
from tests.checkpoints import RawTensor, decode, write_random_placement
from tests.damage import leaves, put, seal
from tests.layouts import relayout, verify
from tests.rewriting.test_rounded_layouts import HIDDEN, REFERENCE, checkpoint, finite, values_of

EMBEDDING = "model.embed_tokens.weight"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
ROUTER = "model.layers.0.router.weight"
NARROW = "model.layers.0.self_attn.narrow.weight"
NORM = "model.norm.weight"


def model_of(folder: Path, dtype: str = "BF16") -> tuple[Path, Path]:
    """A checkpoint with matrices outside its blocks, of which some may be rounded."""
    return checkpoint(
        folder,
        "llama",
        dtype,
        **{
            ATTENTION: finite(dtype, (50, HIDDEN), 11),
            ROUTER: finite(dtype, (4, HIDDEN), 12),
            NARROW: finite(dtype, (HIDDEN, 20), 13),
            NORM: finite(dtype, (HIDDEN,), 14),
        },
    )


def rounded_names(layout: Path) -> dict[str, str]:
    index = json.loads((layout / "model.flash.json").read_text())
    return {tensor["place"]["tensor"]: tensor["weights"] for tensor in index.get("dense", [])}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_rows_are_those_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, weights: str
) -> None:
    model, placement = model_of(tmp_path, dtype)
    relayout(model, placement, tmp_path / "layout", weights="q4_0", dense_weights=weights)
    source = decode(model / "model.safetensors")
    assert rounded_names(tmp_path / "layout") == {EMBEDDING: weights, ATTENTION: weights}
    flash = tmp_path / "layout/model.flash.safetensors"
    with TensorFile(flash) as file:
        for name in (EMBEDDING, ATTENTION):
            expected = gguf.quants.quantize(values_of(source[name]), REFERENCE[weights])
            assert np.array_equal(file.read(name).reshape(expected.shape), expected)
        for name in (ROUTER, NARROW, NORM):
            assert file.read(name).tobytes() == source[name].data
    assert verify(model, tmp_path / "layout").mode == "full"
    # In stretches of any number of rows.
    monkeypatch.setattr(pipeline, "PIECE", 7 * HIDDEN)
    relayout(model, placement, tmp_path / "again", weights="q4_0", dense_weights=weights)
    assert (tmp_path / "again/model.flash.safetensors").read_bytes() == flash.read_bytes()
    verify(model, tmp_path / "again")


def test_the_default_follows_the_weights_of_the_blocks(tmp_path: Path) -> None:
    model, placement = model_of(tmp_path)
    made: dict[str, dict[str, Any]] = {
        "plain": {},
        "beside": {"weights": "gate=q4_0"},
        "exact": {"weights": "q4_0", "dense_weights": "source"},
        "alone": {"dense_weights": "iq4_nl"},
    }
    for name, options in made.items():
        relayout(model, placement, tmp_path / name, **options)
        verify(model, tmp_path / name)
    assert rounded_names(tmp_path / "plain") == rounded_names(tmp_path / "exact") == {}
    assert set(rounded_names(tmp_path / "beside").values()) == {"q8_0"}
    assert set(rounded_names(tmp_path / "alone").values()) == {"iq4_nl"}
    alone = json.loads((tmp_path / "alone/model.flash.json").read_text())
    assert alone["rounding"] == "nearest"
    assert all("weights" not in part for block in alone["blocks"] for part in block["parts"])
    with pytest.raises(UnsupportedError, match="rounded weights"):
        restore(tmp_path / "alone", tmp_path / "restored")
    with pytest.raises(OptionError, match="--dense-weights needs --layout bundled"):
        relayout(model, placement, tmp_path / "out", dense_weights="q8_0", layout="permuted")


def test_the_decoded_checkpoint_has_the_values_of_the_bytes(tmp_path: Path) -> None:
    model, placement = model_of(tmp_path)
    relayout(model, placement, tmp_path / "layout", weights="q4_0", dense_weights="q4_0")
    source = decode(model / "model.safetensors")
    with loadable(tmp_path / "layout") as folder:
        found = decode(folder / "model.safetensors")
    for name in (EMBEDDING, ATTENTION):
        blocks = gguf.quants.quantize(values_of(source[name]), REFERENCE["q4_0"])
        expected = gguf.quants.dequantize(blocks, REFERENCE["q4_0"])
        assert found[name].dtype == "F32"
        assert np.array_equal(values_of(found[name]), expected)
    assert found[ROUTER] == source[ROUTER]


def test_verify_names_the_row_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PIECE", 9 * HIDDEN)
    model, placement = model_of(tmp_path)
    layout = tmp_path / "layout"
    relayout(model, placement, layout, weights="q4_0")
    with open_layout(layout) as opened:
        assert opened.kind == "bundled"
        tensor = opened.dense[ATTENTION]
    flash = layout / "model.flash.safetensors"
    content = bytearray(flash.read_bytes())
    content[tensor.place.offset + 31 * tensor.row_bytes + 5] ^= 1
    flash.write_bytes(content)
    with pytest.raises(VerificationError, match=f"'{ATTENTION}' is not what the source gives as q8_0: row 31$"):
        verify(model, layout)


def test_rows_that_cannot_be_rounded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PIECE", 9 * HIDDEN)
    values = values_of(finite("F32", (50, HIDDEN), 0)).copy()
    values[33, 40] = np.inf
    bad = {ATTENTION: RawTensor("F32", values.shape, values.tobytes())}
    model, placement = checkpoint(tmp_path, "llama", "F32", **bad)
    with pytest.raises(UnsupportedError, match=rf"{ATTENTION}.*row 33 \(32 to 63\) are NaN"):
        relayout(model, placement, tmp_path / "out", weights="q4_0")
    assert not (tmp_path / "out").exists()


def test_no_number_of_a_sealed_index_may_contradict_the_file(tmp_path: Path) -> None:
    model, placement = model_of(tmp_path)
    relayout(model, placement, tmp_path / "layout", weights="q4_0")
    path = tmp_path / "layout/model.flash.json"
    document = json.loads(path.read_text())
    changes: list[tuple[tuple[Any, ...], Any]] = [
        (("dense", *way), value + 1) for way, value in leaves(document["dense"]) if isinstance(value, (int, float))
    ]
    changes += [(("dense", 0, "weights"), "q4_0"), (("dense", 0, "dtype"), "F16")]
    changes += [(("dense", 0, "place", "tensor"), name) for name in (ATTENTION, NORM, "layers.0.bundles", "other")]
    assert len(changes) > 12
    changes = [(way, other) for way, other in changes if _at(document, way) != other]
    for way, other in changes:
        value = _at(document, way)
        put(document, way, other)
        seal(path, document)
        with pytest.raises(NeuralinkError):
            verify(model, tmp_path / "layout", quick=True)
        put(document, way, value)
    seal(path, document)
    verify(model, tmp_path / "layout", quick=True)


def _at(document: Any, way: tuple[Any, ...]) -> Any:
    for step in way:
        document = document[step]
    return document


def test_matrices_outside_the_blocks_do_not_depend_on_the_order(tmp_path: Path) -> None:
    model, placement = model_of(tmp_path)
    other = write_random_placement(model, tmp_path / "other", seed=2)
    for name, order in (("one", placement), ("two", other)):
        relayout(model, order, tmp_path / name, weights="q4_0")
    read = {}
    for name in ("one", "two"):
        with TensorFile(tmp_path / name / "model.flash.safetensors") as file:
            read[name] = file.read(ATTENTION).tobytes()
    assert read["one"] == read["two"]
