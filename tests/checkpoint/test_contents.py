"""Folders that hold something else than a checkpoint: the message says what is there and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError
from tests.checkpoints import write_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
Change = Callable[[Path], object]


def instead(*names: str, config: bool = True) -> Change:
    """Files in place of the weights, and of the config."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        if not config:
            (model / "config.json").unlink()
        for name in names:
            (model / name).write_bytes(b"x")

    return change


def dangling(name: str) -> Change:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("../../blobs/0123")

    return change


def in_a_folder(model: Path) -> None:
    (model / "snapshots/abc").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (model / name).rename(model / "snapshots/abc" / name)


# What is done to a checkpoint, the kind of error, and words of the message: what is there, and what to do.
FOLDERS: dict[str, tuple[Change, type[NeuralinkError], str, str]] = {
    "GGUF": (instead("a-q4.gguf"), UnsupportedError, "has only GGUF weights (a-q4.gguf)", "converted from"),
    "GGUF alone": (
        instead("a.gguf", config=False), InputError, "no config.json, so it is not a HuggingFace checkpoint; it holds "
        "GGUF weights (a.gguf)", "converted from",
    ),
    "Mistral's": (
        instead("consolidated.safetensors", "params.json", config=False), InputError,
        "holds weights in the format of its makers (consolidated.safetensors)", "get the checkpoint for transformers",
    ),
    "Meta's": (instead("consolidated.00.pth"), UnsupportedError, "pickled weights (consolidated.00.pth)", "convert"),
    "pickled shards": (
        instead(*(f"pytorch_model-0000{k}-of-00005.bin" for k in range(1, 6))), UnsupportedError,
        "pickled weights (pytorch_model-00001-of-00005.bin, pytorch_model-00002-of-00005.bin, "
        "pytorch_model-00003-of-00005.bin and 2 more)", "convert them to safetensors",
    ),
    "leftovers of training": (
        instead("training_args.bin", "optimizer.pt"), InputError, "has neither model.safetensors nor", "completely",
    ),
    "variant": (
        instead("model.fp16.safetensors"), UnsupportedError,
        "has only a variant of the weights (model.fp16.safetensors)", "rename its files to model.safetensors",
    ),
    "sharded variant": (
        instead("model.bf16-00001-of-00002.safetensors", "model.safetensors.index.bf16.json"), UnsupportedError,
        "a variant of the weights (model.bf16-00001-of-00002.safetensors)", "rename",
    ),
    "shards without index": (
        instead("model-00001-of-00002.safetensors"), InputError,
        "has neither model.safetensors nor model.safetensors.index.json, but shards without their index", "download",
    ),
    "other names": (
        instead("diffusion_pytorch_model.safetensors"), InputError, "but safetensors files of other names", "save_pret",
    ),
    "TensorFlow's": (instead("tf_model.h5"), UnsupportedError, "weights for another program (tf_model.h5)", "convert"),
    "folder above": (in_a_folder, InputError, "has no config.json", "snapshots/abc, which has one"),
    "adapter beside": (
        lambda model: (model / "adapter_config.json").write_text("{}"), UnsupportedError,
        "holds an adapter (adapter_config.json), which transformers applies to the weights if peft is installed",
        "take its files out of the folder",
    ),
    "weights of an adapter": (
        lambda model: (model / "adapter_model.safetensors").write_bytes(b"x"), UnsupportedError,
        "holds an adapter (adapter_model.safetensors)", "merge it into the weights",
    ),
    "adapter alone": (
        instead("adapter_config.json", "adapter_model.bin", config=False), UnsupportedError,
        "holds an adapter (adapter_config.json, adapter_model.bin)", "merge it into the weights",
    ),
    "dangling config": (dangling("config.json"), InputError, "is a link to ../../blobs/0123, which does", "cp -rL"),
    "dangling weights": (dangling("model.safetensors"), InputError, "is a link to ../../blobs/0123", "download it"),
    "pointer for a config": (
        lambda model: (model / "config.json").write_bytes(POINTER), InputError, "config.json: is a Git LFS pointer",
        "git lfs pull",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_the_message_says_what_is_there_and_what_to_do(tmp_path: Path, name: str) -> None:
    change, kind, there, to_do = FOLDERS[name]
    model = write_checkpoint(tmp_path / "model")
    change(model)
    with pytest.raises(kind) as caught:
        Checkpoint(model)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(str(model))
    assert there in str(caught.value)
    assert to_do in str(caught.value)


def test_a_dangling_shard_is_named(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    dangling("model-00002-of-00002.safetensors")(model)
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: is a link to"):
        Checkpoint(model)
