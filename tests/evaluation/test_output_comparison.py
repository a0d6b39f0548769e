from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.calibration.batches import ModelBatch, text_batch
from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.calibration.sequences import TokenIds
from neuralink_cli.errors import InputError, MismatchError, MissingDependencyError
from neuralink_cli.evaluation.output_comparison import compare_outputs
from tests.conftest import ModelFactory
from tests.tiny_models import MAX_POSITIONS, TEXT

Tensors = dict[str, npt.NDArray[Any]]

# The tensors of a block whose neurons run along axis 0 and axis 1.
NEURON_TENSORS = {
    "opt": (
        ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.bias"],
        ["model.decoder.layers.0.fc2.weight"],
    ),
    "llama": (
        ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"],
        ["model.layers.0.mlp.down_proj.weight"],
    ),
    "gpt2": (
        ["transformer.h.0.mlp.c_fc.bias", "transformer.h.0.mlp.c_proj.weight"],
        ["transformer.h.0.mlp.c_fc.weight"],
    ),
    "bert": (
        ["bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0.intermediate.dense.bias"],
        ["bert.encoder.layer.0.output.dense.weight"],
    ),
}


def batches_of(sequences: Iterable[TokenIds]) -> list[ModelBatch]:
    return [text_batch(ids.astype(np.int64)[None], np.ones((1, ids.size), dtype=bool)) for ids in sequences]


def changed_copy(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("family", list(NEURON_TENSORS))
def test_permuted_neurons_compute_the_same(model: ModelFactory, family: str, tmp_path: Path) -> None:
    rows, columns = NEURON_TENSORS[family]

    def permute(tensors: Tensors) -> None:
        order = np.random.default_rng(0).permutation(tensors[rows[0]].shape[0])
        for name in rows:
            tensors[name] = np.ascontiguousarray(tensors[name][order])
        for name in columns:
            tensors[name] = np.ascontiguousarray(tensors[name][:, order])

    def permute_rows_only(tensors: Tensors) -> None:
        tensors[rows[0]] = np.ascontiguousarray(tensors[rows[0]][::-1])

    original, architecture = model(family), find_architecture(family, tmp_path)
    sequences = read_token_sequences(original, TEXT, sequences=3, length=20)
    batches = batches_of(sequences)
    assert [s.size for s in sequences] == [20, 20, 20]
    same = compare_outputs(original, changed_copy(original, tmp_path / "same", permute), batches, architecture)
    assert same.agrees
    assert 0 <= same.max_abs_difference < 1e-4
    assert (same.tokens, same.same_argmax) == (60, 1.0)
    assert same.reference_scale > 0.1
    wrong_copy = changed_copy(original, tmp_path / "wrong", permute_rows_only)
    wrong = compare_outputs(original, wrong_copy, batches, architecture)
    assert not wrong.agrees
    assert wrong.max_abs_difference > 1e-2
    assert compare_outputs(original, wrong_copy, batches, architecture, tolerance=10).agrees


def test_nan_never_agrees(model: ModelFactory, tmp_path: Path) -> None:
    def poison(tensors: Tensors) -> None:
        tensors["model.decoder.layers.0.fc1.bias"][0] = np.nan

    original = model("opt")
    broken = changed_copy(original, tmp_path / "nan", poison)
    sequences = read_token_sequences(original, TEXT)
    batches = batches_of(sequences)
    assert not compare_outputs(original, broken, batches, find_architecture("opt", tmp_path), tolerance=1e9).agrees


def test_there_is_nothing_to_compare_with_an_original_of_no_numbers(model: ModelFactory, tmp_path: Path) -> None:
    """Its layout is not to blame."""
    norm = "model.decoder.final_layer_norm.bias"
    broken = changed_copy(model("opt"), tmp_path / "inf", lambda tensors: tensors[norm].__setitem__(0, np.inf))
    batches = batches_of(read_token_sequences(broken, TEXT))
    with pytest.raises(InputError, match="outputs are not numbers") as caught:
        compare_outputs(broken, broken, batches, find_architecture("opt", tmp_path))
    assert caught.value.where == str(broken)


def test_sequences_have_no_more_tokens_than_the_model_has_positions(model: ModelFactory) -> None:
    found = read_token_sequences(model("gpt2"), TEXT, sequences=2, length=100)
    assert [ids.size for ids in found] == [MAX_POSITIONS] * 3 + [200 - 3 * MAX_POSITIONS]
    longer = read_token_sequences(model("gpt2"), TEXT, sequences=2, length=40)
    assert np.array_equal(np.concatenate(found)[:80], np.concatenate(longer))


def test_missing_weights_are_not_made_up(model: ModelFactory, tmp_path: Path) -> None:
    original = model("llama")
    headless = changed_copy(original, tmp_path / "headless", lambda tensors: tensors.pop("lm_head.weight"))
    sequences = read_token_sequences(original, TEXT)
    batches = batches_of(sequences)
    with pytest.raises(InputError, match=r"lm_head\.weight' is missing"):
        compare_outputs(original, headless, batches, find_architecture("llama", tmp_path))


def test_models_of_other_shapes(model: ModelFactory, tmp_path: Path) -> None:
    def cut_vocabulary(tensors: Tensors) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name][:300]

    original = model("llama")
    smaller = changed_copy(original, tmp_path / "smaller", cut_vocabulary)
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    batches = batches_of([np.arange(9, dtype=np.int32)])
    with pytest.raises(MismatchError, match=r"outputs of shape \(9, 300\), .* of \(9, 320\)"):
        compare_outputs(original, smaller, batches, find_architecture("llama", tmp_path))


def test_text_without_tokens(model: ModelFactory) -> None:
    with pytest.raises(InputError, match="has no tokens"):
        read_token_sequences(model("gpt2"), "")


def test_without_transformers_the_extra_is_named(
    model: ModelFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependencyError):
        compare_outputs(tmp_path, tmp_path, [], find_architecture("opt", tmp_path))
