"""Which files belong to a checkpoint: the rule by names, and what a folder may hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.companions import (
    COPIES,
    HIDDEN,
    LAYOUTS,
    TRAINING,
    UNFINISHED,
    FolderContents,
    FolderFile,
    LeftOut,
    find_companions,
    left_out_files,
)
from neuralink_cli.errors import InputError
from tests.checkpoints import write_checkpoint

WEIGHTS = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

ALONG = [
    "config.json",
    "README.md",
    "tokenizer.model",
    "merges[1].txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "modeling_own.py",
    "imgs/logo.png",
    "figures/a/b/c.svg",
    "LICENSE",
    # Heads in files of their own, whatever their form.
    "sparse_linear.pt",
    "colbert_linear.pt",
    "value_head.safetensors",
    "mm_projector.bin",
    "training_args.bin",
    "mel_filters.npz",
    # Modules and models of their own, with weights that are nowhere else.
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "3_Dense/pytorch_model.bin",
    "speech/model-00001-of-00001.safetensors",
    "speech/model.safetensors.index.json",
    "speech-lora/adapter_model.safetensors",
    # What goes with the makers' weights.
    "original/params.json",
    "original/tokenizer.model",
    # Only almost what is left out.
    "model_card.json",
    "task.json",
    "onnx.md",
    "checkpoint-notes/a.txt",
    "originals/x.bin",
]
LEFT_OUT = {
    COPIES: [
        "model-00001-of-00003.safetensors",
        "model.fp16.safetensors",
        "model.bf16-00001-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model.fp16.bin",
        "tf_model.h5",
        "tf_model-00001-of-00002.h5",
        "tf_model.h5.index.json",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.ckpt.data-00000-of-00001",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "consolidated.safetensors.index.json",
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "original/shards/x.distcp",
        "model.gguf",
        "sub/folder/model-Q4_K_M.gguf",
        "model.onnx",
        "model.onnx_data",
        "model.onnx_data_1",
        "model.onnx.data",
        "onnx__MatMul_123",
        "onnx/model.onnx",
        "onnx/config.json",
        "onnx/decoder/weight_of_a_layer",
        "openvino/openvino_model.bin",
        "openvino_model.xml",
        "coreml/model.mlpackage/Data/weights/weight.bin",
        "64.tflite",
        "model.pte",
        "model.litertlm",
        "model.task",
        "weights.00.npz",
        "metal/model.pte",
    ],
    TRAINING: ["optimizer.pt", "checkpoint-500/model.safetensors", "checkpoint-500/config.json", "global_step10/x.pt"],
    UNFINISHED: ["model-00002-of-00002.safetensors.part", "x.incomplete", "sub/tokenizer.json.aria2"],
    HIDDEN: [".gitattributes", ".git/objects/ab/cd", "sub/.cache/x", "__pycache__/a.cpython-312.pyc", ".huggingface/x"],
    LAYOUTS: ["flash/model.flash.json", "flash/sub/config.json", "a/permuted/model.permuted.json", "a/permuted/x"],
}


def test_every_name_is_a_companion_or_left_out_for_a_reason() -> None:
    names = [*WEIGHTS, *ALONG, *(name for files in LEFT_OUT.values() for name in files)]
    assert len(set(names)) == len(names)
    expected = {name: why for why, files in LEFT_OUT.items() for name in files}
    assert left_out_files(names, WEIGHTS) == expected


def test_weights_in_a_folder_below_are_a_copy_only_beside_the_same_as_safetensors() -> None:
    names = ["model.safetensors", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "3_Dense/pytorch_model.bin"]
    assert left_out_files(names, ["model.safetensors"]) == {"2_Dense/pytorch_model.bin": COPIES}


def test_weights_are_never_left_out_whatever_they_are_called() -> None:
    weights = ["model.safetensors.index.json", "model.fp16.safetensors", "consolidated.safetensors"]
    assert left_out_files(weights, weights) == {}


def contents(model: Path, *, all_files: bool = False) -> FolderContents:
    with Checkpoint(model) as checkpoint:
        return find_companions(model, checkpoint.weight_names, all_files=all_files)


def names_of(found: FolderContents) -> list[str]:
    return [file.name for file in found.companions]


def test_names_and_sizes_of_a_folder(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2, readme=b"x" * 7)
    for name, size in (("a/b/c.txt", 3), (".git/objects/x", 5), ("pytorch_model.bin", 11), ("onnx/y", 0)):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(bytes(size))
    (model / "empty").mkdir()
    found = contents(model)
    sizes = {name: (model / name).stat().st_size for name in ("config.json", "tokenizer.json")}
    assert found.companions == (
        FolderFile("README.md", 7),
        FolderFile("a/b/c.txt", 3),
        FolderFile("config.json", sizes["config.json"]),
        FolderFile("tokenizer.json", sizes["tokenizer.json"]),
    )
    assert found.left_out == (
        LeftOut(".git/objects/x", 5, HIDDEN),
        LeftOut("onnx/y", 0, COPIES),
        LeftOut("pytorch_model.bin", 11, COPIES),
    )
    everything = contents(model, all_files=True)
    assert everything.left_out == ()
    assert names_of(everything) == sorted([*names_of(found), *(file.name for file in found.left_out)])


def test_links_are_followed_to_files(tmp_path: Path) -> None:
    """As a hub cache has every file."""
    model = write_checkpoint(tmp_path / "model", readme=None)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0123").write_text("four")
    (model / "1_Pooling").mkdir()
    (model / "vocab.txt").symlink_to("../blobs/0123")
    (model / "1_Pooling/config.json").symlink_to(tmp_path / "model/vocab.txt")
    found = {file.name: file.nbytes for file in contents(model).companions}
    assert found.keys() == {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"}
    assert (found["vocab.txt"], found["1_Pooling/config.json"]) == (4, 4)


@pytest.mark.parametrize("target", ["../others", ".", ".."])
def test_links_are_not_followed_to_folders(tmp_path: Path, target: str) -> None:
    """Somebody's checkpoint cannot make all of a disk a part of a layout, nor go round in circles."""
    model = write_checkpoint(tmp_path / "model")
    (tmp_path / "others").mkdir()
    (model / "data").symlink_to(target)
    with pytest.raises(InputError) as caught:
        contents(model)
    assert str(caught.value).startswith(f"{model / 'data'}: is a link to {target}, a folder, which is not followed; ")
    (model / "data").rename(model / ".data")
    assert [file.name for file in contents(model).left_out] == [".data"]


@pytest.mark.parametrize("name", ["generation_config.json", "1_Pooling/config.json"])
def test_a_link_to_nothing_is_named_with_its_target(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to("../../blobs/0123")
    with pytest.raises(InputError) as caught:
        contents(model)
    assert str(caught.value).startswith(f"{model / name}: is a link to ../../blobs/0123, which does not exist; ")


def test_a_missing_file_beside_the_weights_is_found_whatever_is_done_with_the_checkpoint(tmp_path: Path) -> None:
    """A library would take the link for no file at all and go on, with another chat template, say."""
    model = write_checkpoint(tmp_path / "model")
    (model / "generation_config.json").symlink_to("../blobs/0123")
    with pytest.raises(InputError, match=r"generation_config\.json: is a link to ../blobs/0123"):
        Checkpoint(model)


def test_a_link_to_nothing_matters_only_where_it_would_be_followed(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / ".cache").mkdir()
    for name in ("pytorch_model.bin", ".cache/x"):
        (model / name).symlink_to("nowhere")
    found = contents(model)
    assert [file.name for file in found.left_out] == [".cache/x", "pytorch_model.bin"]
    with pytest.raises(InputError, match=r"\.cache/x: is a link to nowhere"):
        contents(model, all_files=True)


def test_links_in_circles_lead_nowhere(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / "x.txt").symlink_to("y.txt")
    (model / "y.txt").symlink_to("x.txt")
    with pytest.raises(InputError, match=r"[xy]\.txt: is a link to [xy]\.txt"):
        contents(model)


def test_pipes_are_refused_at_any_depth(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / "a/b").mkdir(parents=True)
    os.mkfifo(model / "a/b/pipe")
    with pytest.raises(InputError, match=r"a/b/pipe: is a pipe, not a regular file"):
        contents(model)


def test_what_is_hidden_is_never_opened_nor_followed(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / ".git").mkdir()
    os.mkfifo(model / ".git/pipe")
    (model / ".git/up").symlink_to("..")
    assert [file.name for file in contents(model).left_out] == [".git/pipe", ".git/up"]


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / Path(*"d" * 50)).mkdir(parents=True)
    (model / Path(*"d" * 50) / "x").write_bytes(b"x")
    assert "d/" * 50 + "x" in names_of(contents(model))
    (model / Path(*"d" * 50) / "e").mkdir()
    with pytest.raises(InputError, match="d/e: lies more than 50 folders deep"):
        contents(model)
