from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError
from tests.checkpoints import RawTensor, encode, random_tensor, tensors_of, write_checkpoint, write_weights

INDEX = "model.safetensors.index.json"


def fingerprint(directory: Path) -> str:
    with Checkpoint(directory) as checkpoint:
        return checkpoint.fingerprint


def expected_fingerprint(tensors: dict[str, RawTensor]) -> str:
    """The fingerprint by its description."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        line = json.dumps([name, tensor.dtype, list(tensor.shape)], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
        size = len(tensor.data)
        starts = [0] if size <= 16_384 else [k * (size - 4096) // 3 for k in range(4)]
        for start in starts:
            digest.update(tensor.data[start : start + (size if size <= 16_384 else 4096)])
    return digest.hexdigest()


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_sees_all_tensors_whatever_the_sharding(tmp_path: Path, family: str, shards: int) -> None:
    tensors = tensors_of(family)
    with Checkpoint(write_checkpoint(tmp_path / "model", family, shards=shards)) as checkpoint:
        assert checkpoint.model_type == family
        assert checkpoint.sharded == (shards > 1)
        assert len(checkpoint.files) == shards
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.total_bytes == sum(len(tensor.data) for tensor in tensors.values())
        for name, tensor in tensors.items():
            place = checkpoint.place(name)
            assert (place.entry.dtype, place.entry.shape) == (tensor.dtype, tensor.shape)
            assert place.file.read(name).tobytes() == tensor.data
        assert "absent" not in checkpoint
        with pytest.raises(InputError, match="model: tensor 'absent' is missing"):
            checkpoint.place("absent")


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    (model / "model.safetensors").write_bytes(encode({"only": random_tensor(np.random.default_rng(0), "U8", 3)}))
    with Checkpoint(model) as checkpoint:
        assert list(checkpoint.tensors) == ["only"]
        assert not checkpoint.sharded


def test_fingerprint_is_as_described_and_independent_of_the_sharding(tmp_path: Path) -> None:
    tensors = tensors_of("opt", dtype="BF16")
    assert max(len(tensor.data) for tensor in tensors.values()) > 16_384
    found = {
        fingerprint(write_checkpoint(tmp_path / str(shards), tensors=tensors, shards=shards)) for shards in (1, 2, 4)
    }
    assert found == {expected_fingerprint(tensors)}


@pytest.mark.parametrize("size", [0, 1, 4096, 16_384, 16_385, 16_386, 20_001])
def test_fingerprint_of_tensors_around_the_sampled_size(tmp_path: Path, size: int) -> None:
    tensors = {"a": random_tensor(np.random.default_rng(size), "U8", size)}
    assert fingerprint(write_checkpoint(tmp_path / "model", tensors=tensors)) == expected_fingerprint(tensors)


def test_fingerprint_sees_every_change_of_what_it_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole, sampled = random_tensor(random, "U8", 16_384), random_tensor(random, "U8", 30_001)
    tensors = {"whole": whole, "sampled": sampled, "vector": random_tensor(random, "F32", 6)}
    seen = [expected_fingerprint(tensors)]

    def flipped(tensor: RawTensor, byte: int) -> RawTensor:
        data = bytearray(tensor.data)
        data[byte] ^= 1
        return replace(tensor, data=bytes(data))

    starts = [k * (30_001 - 4096) // 3 for k in range(4)]
    changes: list[dict[str, RawTensor]] = [{"whole": flipped(whole, byte)} for byte in (0, 8191, 16_383)]
    changes += [{"sampled": flipped(sampled, byte)} for start in starts for byte in (start, start + 4095)]
    changes += [
        {"vector": replace(tensors["vector"], shape=(2, 3))},
        {"vector": replace(tensors["vector"], dtype="I32")},
        {"another": random_tensor(random, "U8", 0)},
    ]
    for k, change in enumerate(changes):
        directory = write_checkpoint(tmp_path / str(k), tensors={**tensors, **change})
        seen.append(fingerprint(directory))
        assert seen[-1] == expected_fingerprint({**tensors, **change})
    renamed = {("x" + name if name == "vector" else name): tensor for name, tensor in tensors.items()}
    seen.append(fingerprint(write_checkpoint(tmp_path / "renamed", tensors=renamed)))
    assert len(set(seen)) == len(seen) == 1 + len(changes) + 1


def edit_index(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((model / INDEX).read_text())
    replacement = change(document)
    (model / INDEX).write_text(json.dumps(document if replacement is None else replacement))


def set_shard(name: object) -> Callable[[Path], object]:
    return lambda model: edit_index(model, lambda index: index["weight_map"].update(mask=name))


def add_stray_tensor(model: Path) -> None:
    edit_index(model, lambda index: index["weight_map"].update(stray="model-00001-of-00002.safetensors"))


def swap_shards(model: Path) -> None:
    first, second = (model / f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    spare = first.rename(model / "spare")
    second.rename(first)
    spare.rename(second)


def duplicate_tensor(model: Path) -> None:
    mask = {"mask": random_tensor(np.random.default_rng(0), "U8", 2)}
    for k in (1, 2):
        (model / f"model-0000{k}-of-00002.safetensors").write_bytes(encode(mask))
    weight_map = {"mask": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    edit_index(model, lambda index: index.update(weight_map=weight_map))


def set_config(**changes: object) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def leave_only(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        for path in model.glob("model*"):
            path.unlink()
        (model / name).write_bytes(b"\x80\2}q\0.")

    return change


def replace_by_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_bytes(b"")


def point_to_lfs(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def cut_last_shard(model: Path) -> None:
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


PLAIN = "is not a plain *.safetensors name"
DAMAGES: dict[str, tuple[Callable[[Path], object], type[NeuralinkError], str]] = {
    "missing": (shutil.rmtree, InputError, "no such directory; MODEL is a local HuggingFace checkpoint directory"),
    "a file": (replace_by_file, InputError, "is a file; MODEL is the directory that holds config.json"),
    "no config": (lambda model: (model / "config.json").unlink(), InputError, "has no config.json, so it is not a"),
    "config is no JSON": (lambda model: (model / "config.json").write_text("{"), InputError, "not valid JSON"),
    "config is a list": (lambda model: (model / "config.json").write_text("[]"), InputError, "not a JSON object"),
    "no model_type": (set_config(model_type=None), InputError, "config.json: has no model_type"),
    "model_type is a number": (set_config(model_type=3), InputError, "config.json: has no model_type"),
    "no weights": (lambda model: (model / INDEX).unlink(), InputError, "has neither model.safetensors nor"),
    "GPTQ": (
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        UnsupportedError,
        "is quantised (gptq): packed weights have no neuron rows to reorder; lay out the unquantised",
    ),
    "quantised somehow": (set_config(quantization_config={"bits": 4}), UnsupportedError, "is quantised (unknown)"),
    "quantised oddly": (set_config(quantization_config="awq"), UnsupportedError, "is quantised"),
    "compressed": (
        set_config(compression_config={"quant_method": "compressed-tensors"}),
        UnsupportedError,
        "is quantised (compressed-tensors)",
    ),
    "pickle": (leave_only("pytorch_model.bin"), UnsupportedError, "has only pickled weights (pytorch_model.bin)"),
    "pickle shards": (leave_only("pytorch_model.bin.index.json"), UnsupportedError, "has only pickled weights"),
    "consolidated pickle": (leave_only("consolidated.00.pth"), UnsupportedError, "has only pickled weights"),
    "flash layout": (
        lambda model: (model / "model.flash.json").write_text("{}"),
        UnsupportedError,
        "is a flash layout, not a checkpoint; get the checkpoint back with `neuralink restore`",
    ),
    "shard missing": (
        lambda model: (model / "model-00002-of-00002.safetensors").unlink(),
        InputError,
        "shard model-00002-of-00002.safetensors is missing; download the whole checkpoint",
    ),
    "shard in a parent folder": (
        set_shard("../other.safetensors"), InputError, f"'../other.safetensors' of tensor 'mask' {PLAIN}"
    ),
    "shard in a folder": (set_shard("sub/x.safetensors"), InputError, PLAIN),
    "shard in a Windows folder": (set_shard("sub\\x.safetensors"), InputError, PLAIN),
    "absolute shard": (set_shard("/etc/x.safetensors"), InputError, PLAIN),
    "hidden shard": (set_shard(".x.safetensors"), InputError, PLAIN),
    "shard with a NUL": (set_shard("x\0.safetensors"), InputError, PLAIN),
    "shard of another kind": (set_shard("pytorch_model.bin"), InputError, PLAIN),
    "nameless shard": (set_shard(""), InputError, PLAIN),
    "shard is a number": (set_shard(7), InputError, PLAIN),
    "shard is a list": (set_shard(["model-00001-of-00002.safetensors"]), InputError, PLAIN),
    "no weight_map": (lambda model: edit_index(model, lambda _: {"metadata": {}}), InputError, "has no weight_map"),
    "empty weight_map": (
        lambda model: edit_index(model, lambda _: {"weight_map": {}}), InputError, "has no weight_map"
    ),
    "weight_map is a list": (
        lambda model: edit_index(model, lambda _: {"weight_map": [1]}), InputError, "has no weight_map"
    ),
    "index names the wrong shard": (swap_shards, InputError, ".safetensors, but it is in model-0000"),
    "tensor in two shards": (
        duplicate_tensor, InputError, "tensor 'mask' is also in model-00001-of-00002.safetensors"
    ),
    "LFS pointer": (point_to_lfs, InputError, "is a Git LFS pointer"),
    "cut shard": (cut_last_shard, InputError, "model-00002-of-00002.safetensors: file is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_refuses(tmp_path: Path, name: str) -> None:
    damage, kind, complaint = DAMAGES[name]
    model = write_checkpoint(tmp_path / "model", shards=2)
    damage(model)
    with pytest.raises(kind) as caught:
        Checkpoint(model)
    assert type(caught.value) is kind
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(str(model))


def test_an_index_may_name_tensors_that_no_shard_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As that of flan-t5-xl does, whose model loads without them."""
    model = write_checkpoint(tmp_path / "model", shards=2)
    before = fingerprint(model)
    add_stray_tensor(model)
    with caplog.at_level("INFO"), Checkpoint(model) as checkpoint:
        assert "stray" not in checkpoint
        assert checkpoint.fingerprint == before
    assert "names 'stray', which no shard has" in caplog.text


def test_an_index_may_name_a_tensor_twice(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    before = fingerprint(model)
    text = (model / INDEX).read_text()
    first = text[text.index('"weight_map": {') + len('"weight_map": {') :].partition(",")[0]
    (model / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{{first}, '))
    assert fingerprint(model) == before


def test_config_may_have_what_transformers_accepts(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "opt")
    text = (model / "config.json").read_text()
    odd = '{"dropout": NaN, "range": [-Infinity, Infinity], "model_type": "bert", '
    (model / "config.json").write_text(odd + text.removeprefix("{"))
    with Checkpoint(model) as checkpoint:
        assert checkpoint.model_type == "opt"
        assert checkpoint.config["range"] == [float("-inf"), float("inf")]


def test_never_opens_what_lies_outside(tmp_path: Path) -> None:
    """The file that the index points to is there and complete, so that only the check of the name can refuse it."""
    model = write_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "other.safetensors").write_bytes(encode({"mask": random_tensor(np.random.default_rng(0), "U8", 2)}))
    set_shard("../other.safetensors")(model)
    with pytest.raises(InputError, match="is not a plain"):
        Checkpoint(model)


def test_an_empty_quantization_config_is_none(tmp_path: Path) -> None:
    with Checkpoint(write_checkpoint(tmp_path / "model", config={"quantization_config": {}})) as checkpoint:
        assert checkpoint.config["quantization_config"] == {}


def test_a_damaged_checkpoint_leaves_no_descriptor_open(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    cut_last_shard(model)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(InputError):
        Checkpoint(model)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_tensor_names_are_never_paths(tmp_path: Path) -> None:
    tensors = {name: random_tensor(np.random.default_rng(0), "U8", 3) for name in ("../../x", "/etc/passwd", "")}
    model = tmp_path / "model"
    write_checkpoint(model, tensors=tensors)
    write_weights(model, tensors)
    with Checkpoint(model) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
