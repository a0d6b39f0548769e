"""Which files of a checkpoint's folder accompany its weights, and which are left out (docs/format.md says the rule)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.checkpoint.contents import refuse_dangling_link
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX, SHARD, SHARD_INDEX, SINGLE_FILE, VARIANT
from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import require_reachable, require_regular

COPIES = "other copies of the weights"
TRAINING = "states of training"
UNFINISHED = "unfinished downloads"
LAYOUTS = "layouts"
HIDDEN = "hidden files and caches"

_UNFINISHED = re.compile(r".*\.(part|partial|incomplete|aria2|crdownload)")
_TRAINING_FOLDER = re.compile(r"(checkpoint|tmp-checkpoint)-\d+|global_step\d+")
_OPTIMIZER = re.compile(r"optimizer.*\.(pt|pth|bin|safetensors)")
# Folders that hold the model as another program wants it, all of it.
_PROGRAM_FOLDER = re.compile(r"onnx|openvino|coreml|saved_model|.*\.(mlpackage|mlmodelc)")
# Files of such programs, wherever they lie.
_PROGRAM_FILE = re.compile(
    r".*\.onnx([._]data(_\d+)?)?|onnx__.*|.*\.ort|openvino_.*\.(xml|bin)"
    r"|.*\.(gguf|ggml)|ggml-.*\.bin"
    r"|.*\.(tflite|task|litertlm|pte|ptd|mlmodel|dlc|mnn|rknn|rkllm|hef|keras|nemo|engine|plan|trt)|.*\.ncnn\.(param|bin)"
    r"|(model|weights).*\.npz|consolidated.*\.(safetensors|pth|pt|bin)(\.index\.json)?"
)
# In a folder that has safetensors weights, the same once more.
_SAME_AGAIN = re.compile(
    r"pytorch_model.*\.bin(\.index(\.[\w-]+)?\.json)?|tf_model.*\.h5(\.index\.json)?|flax_model.*\.msgpack(\.index\.json)?"
    r"|rust_model\.ot|model\.(bin|pt|pth|pkl)|(bert_|tf_)?model\.ckpt.*|model\.safetensors\.index\.[\w-]+\.json"
)
# In a folder called so the makers keep the weights in their own form, and the small files that go with them.
_MAKERS_FOLDER = "original"
_MAKERS_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|distcp|pkl)(\.index\.json)?")

# Folders within folders: no checkpoint has as many, and not all tools that copy or delete them can.
_DEEPEST = 50


@dataclass(frozen=True)
class FolderFile:
    """A file of a checkpoint's folder: its name relative to the folder, with slashes, and its size in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class LeftOut(FolderFile):
    """A file that is left out; `why` is a phrase that says what such files are."""

    why: str


@dataclass(frozen=True)
class FolderContents:
    """What lies in a checkpoint's folder beside its weights, both in the order of names."""

    companions: tuple[FolderFile, ...]
    left_out: tuple[LeftOut, ...]


def find_companions(directory: Path, weights: Collection[str], *, all_files: bool = False) -> FolderContents:
    """The files beside the weights in a folder and the folders below it. Links to files are followed.

    Args:
        weights: Names of the weight files and of their index.
        all_files: Leave nothing out.

    Raises:
        InputError: What is not left out holds a link to nothing or to a folder, or a pipe or device.
    """
    found = {name: status for name, status in _walk(directory, all_files=all_files) if name not in weights}
    reasons = {} if all_files else left_out_files([*found, *weights], weights)
    companions, left_out = [], []
    for name, status in sorted(found.items()):
        if name in reasons:
            left_out.append(LeftOut(name, 0 if status is None else status.st_size, reasons[name]))
        else:
            companions.append(FolderFile(name, _require_file(directory / name, status).st_size))
    return FolderContents(tuple(companions), tuple(left_out))


def left_out_files(names: Collection[str], weights: Collection[str]) -> dict[str, str]:
    """The files that do not accompany the weights, and what such files are, in a phrase.

    Args:
        names: All files of a folder, relative to it, with slashes.
        weights: Those that are the weights and their index.
    """
    with_weights = _folders_with(names, (SINGLE_FILE, SHARD_INDEX))
    layouts = _folders_with(names, (FLASH_INDEX, PERMUTED_INDEX)) - {""}
    reasons = {}
    for name in names:
        if name not in weights:
            why = _why_left_out(name, with_weights, layouts)
            if why is not None:
                reasons[name] = why
    return reasons


def _why_left_out(name: str, with_weights: Set[str], layouts: Set[str]) -> str | None:
    *folders, file = name.split("/")
    if any(part.startswith(".") or part == "__pycache__" for part in (*folders, file)):
        return HIDDEN
    if any(name.startswith(f"{layout}/") for layout in layouts):
        return LAYOUTS
    if _UNFINISHED.fullmatch(file):
        return UNFINISHED
    if _OPTIMIZER.fullmatch(file) or any(_TRAINING_FOLDER.fullmatch(folder) for folder in folders):
        return TRAINING
    copy = (
        _PROGRAM_FILE.fullmatch(file)
        or any(_PROGRAM_FOLDER.fullmatch(folder) for folder in folders)
        or (_MAKERS_FOLDER in folders and _MAKERS_WEIGHTS.fullmatch(file))
        or (_folder(name) in with_weights and (_SAME_AGAIN.fullmatch(file) or VARIANT.fullmatch(file)))
        # Shards and their index, where a single file with all weights has taken their place.
        or (not folders and (file == SHARD_INDEX or SHARD.fullmatch(file)))
    )
    return COPIES if copy else None


def _folders_with(names: Collection[str], wanted: Collection[str]) -> set[str]:
    return {_folder(name) for name in names if name.rpartition("/")[2] in wanted}


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _walk(directory: Path, *, all_files: bool) -> Iterator[tuple[str, os.stat_result | None]]:
    """Everything below a folder but folders, and its status; None for a link to nothing. Links to folders end there."""
    folders = [(directory, "", 0)]
    while folders:
        folder, prefix, depth = folders.pop()
        # Of what is hidden only the size is wanted.
        lenient = not all_files and any(part.startswith(".") for part in prefix.split("/"))
        for child in _children(folder, lenient=lenient):
            status = _status(child, follow=not lenient)
            if status is None or not stat.S_ISDIR(status.st_mode) or child.is_symlink():
                yield prefix + child.name, status
            elif depth < _DEEPEST:
                folders.append((child, f"{prefix}{child.name}/", depth + 1))
            elif not lenient:
                raise InputError(
                    f"lies more than {_DEEPEST} folders deep", where=child, fix="take it out of the folder"
                )


def _children(folder: Path, *, lenient: bool) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        if lenient:
            return []
        raise InputError(f"cannot be listed ({error.strerror})", where=folder) from None


def _status(path: Path, *, follow: bool) -> os.stat_result | None:
    try:
        return path.stat() if follow else path.lstat()
    except OSError:
        return None


def _require_file(path: Path, status: os.stat_result | None) -> os.stat_result:
    refuse_dangling_link(path)
    if path.is_symlink() and path.is_dir():
        raise InputError(
            f"is a link to {path.readlink()}, a folder, which is not followed",
            where=path,
            fix="put a copy of the folder in its place, or take the link out",
        )
    require_reachable(path)
    require_regular(path)
    if status is None:
        raise InputError(
            "was there a moment ago and is gone", where=path, fix="run it again when nothing else writes to it"
        )
    return status
