"""Bad checkpoints: one clear line, a documented exit code, and nothing left behind, whatever the command."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, NEURONS, encode, random_tensor, tensors_of, write_checkpoint
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"
UP = "model.decoder.layers.1.fc1.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and leave its data as it is."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def repeat_name(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length]
    first = text[1 : text.index(b"}") + 1]
    text = b"{" + first + b", " + text[1:]
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def set_config(**changes: object) -> Damage:
    return lambda model: edit_json(model / "config.json", lambda config: config.update(changes))


def make_pickle_only(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def shift(header: dict[str, Any], by: int) -> None:
    last = max((spec for name, spec in header.items() if name != "__metadata__"), key=lambda s: s["data_offsets"][1])
    last["data_offsets"] = [position + by for position in last["data_offsets"]]


def grow(header: dict[str, Any]) -> None:
    next(spec for name, spec in header.items() if name != "__metadata__")["shape"].append(2)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# What is done to a checkpoint of two shards, the exit code, and words of the message.
CHECKPOINTS: dict[str, tuple[Damage, int, str]] = {
    "missing": (shutil.rmtree, 3, "no such directory; MODEL is a local HuggingFace checkpoint directory"),
    "not from HuggingFace": (lambda m: (m / "config.json").unlink(), 3, "has no config.json, so it is not a Hugging"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{'a': 1}"), 3, "config.json: not valid JSON"),
    "pickle": (make_pickle_only, 4, "has only pickled weights (pytorch_model.bin), which can run code when loaded"),
    "LFS pointer": (
        lambda m: (m / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        3,
        f"{SECOND}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    ),
    "shard missing": (lambda m: (m / SECOND).unlink(), 3, f"shard {SECOND} is missing; download the whole checkpoint"),
    "shard elsewhere": (
        lambda m: edit_json(m / INDEX, lambda index: index["weight_map"].update(mask="../model.safetensors")),
        3,
        "shard name '../model.safetensors' of tensor 'mask' is not a plain *.safetensors name",
    ),
    "header cut": (lambda m: (m / SECOND).write_bytes((m / SECOND).read_bytes()[:100]), 3, "truncated: the header"),
    "data cut": (lambda m: cut(m / SECOND), 3, "file is truncated"),
    "empty file": (lambda m: (m / SECOND).write_bytes(b""), 3, "too short for a safetensors file (0 bytes)"),
    "overlap": (lambda m: edit_header(m / SECOND, lambda h: shift(h, -4)), 3, "overlaps the tensor before it"),
    "hole": (lambda m: edit_header(m / SECOND, lambda h: shift(h, 4)), 3, "leaves a hole before it"),
    "duplicate name": (lambda m: repeat_name(m / SECOND), 3, "duplicate key '__metadata__'"),
    "size": (lambda m: edit_header(m / SECOND, grow), 3, "spans 15 bytes, but U8 [3, 5, 2] takes 30"),
    "quantised": (
        set_config(quantization_config={"quant_method": "awq", "bits": 4}), 4, "is quantised (awq): packed weights"
    ),
    "no MXFP4": (
        set_config(quantization_config={"quant_method": "mxfp4"}), 4, "is quantised (mxfp4): packed weights"
    ),
}  # fmt: skip


def drop_tensor(model: Path) -> None:
    change_tensor(model, lambda tensors: tensors.pop(UP))


def reshape_tensor(model: Path) -> None:
    wrong = random_tensor(np.random.default_rng(0), "F32", NEURONS, HIDDEN + 1)
    change_tensor(model, lambda tensors: tensors.update({UP: wrong}))


def change_tensor(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = tensors_of("opt")
    change(tensors)
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    (model / "model.safetensors").write_bytes(encode(tensors))


# The same for what only those commands notice that look for the FFN blocks.
BLOCKS: dict[str, tuple[Damage, int, str]] = {
    "unknown architecture": (
        set_config(model_type="mamba9"), 4, "architecture 'mamba9' is not known (`neuralink arch"
    ),
    "tensor missing": (drop_tensor, 3, f"tensor '{UP}' is missing"),
    "tensor of wrong shape": (reshape_tensor, 3, "'model.decoder.layers.1.fc2.weight' of shape [20, 37] does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["relayout", "profile", "verify"])
@pytest.mark.parametrize("name", [*CHECKPOINTS, *BLOCKS])
def test_bad_checkpoints(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory, name: str, command: str
) -> None:
    damage, code, complaint = {**CHECKPOINTS, **BLOCKS}[name]
    made = layouts.bundled(shards=2)
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    damage(model)
    (tmp_path / "text.txt").write_text("some text\n")
    outcome = {
        "relayout": lambda: neuralink("relayout", model, "--placement", made.placement, "-o", outputs / "out"),
        "profile": lambda: neuralink("profile", model, "--dataset", tmp_path / "text.txt", "-o", outputs / "out"),
        "verify": lambda: neuralink("verify", model, made.layout),
    }[command]()
    if name in BLOCKS and command == "verify":
        # It compares what is there, whatever it is: another config is another file, other tensors are another model.
        assert outcome.code == (1 if name == "unknown architecture" else 5)
    else:
        assert outcome.code == code
        assert complaint in outcome.error
        assert str(model) in outcome.error
    assert not any(outputs.iterdir())
    assert not Path("pwned").exists()


def test_an_unknown_architecture_is_told_where_to_add_it(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory
) -> None:
    model = write_checkpoint(tmp_path / "model", config={"model_type": "mamba9"})
    _, placement = layouts.checkpoint()
    error = neuralink("relayout", model, "--placement", placement, "-o", outputs / "out").error
    assert error.startswith(f"{model}: architecture 'mamba9' is not known (`neuralink architectures` lists")
    assert error.endswith("or describe it in a JSON file (docs/architectures.md) for --architecture")


def test_an_architecture_of_the_user_takes_its_place(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory
) -> None:
    model = write_checkpoint(tmp_path / "model", config={"model_type": "mamba9"})
    _, placement = layouts.checkpoint()
    document = {
        "name": "mine", "model_types": ["mamba9"], "task": "causal-lm", "prefixes": ["model.decoder."],
        "activation": {"default": "relu"},
        "blocks": [{
            "id": "layers.${layer}",
            "up": {"weight": "layers.${layer}.fc1.weight", "neuron_axis": 0, "bias": "layers.${layer}.fc1.bias"},
            "down": {"weight": "layers.${layer}.fc2.weight", "neuron_axis": 1, "bias": "layers.${layer}.fc2.bias"},
        }],
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(document))
    arguments = ("relayout", model, "--placement", placement, "-o", outputs / "out", "--architecture")
    assert neuralink(*arguments, tmp_path / "mine.json").code == 0
    assert neuralink("verify", model, outputs / "out").code == 0
    shutil.rmtree(outputs / "out")
    (tmp_path / "mine.json").write_text(json.dumps({**document, "colour": "blue"}))
    outcome = neuralink(*arguments, tmp_path / "mine.json")
    assert outcome.code == 3
    assert "mine.json: not a valid architecture: at the top" in outcome.error
    assert "'colour' was unexpected" in outcome.error
    assert neuralink(*arguments, tmp_path / "absent.json").code == 3
    assert not any(outputs.iterdir())
