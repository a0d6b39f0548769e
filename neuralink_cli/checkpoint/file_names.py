"""The file names of a checkpoint, and which files are weights, small files or modules."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
FLASH_INDEX = "model.flash.json"
_WEIGHT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"),
        *(".onnx", ".onnx_data", ".gguf", ".ot", ".pkl", ".tflite"),
    )
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")
_MODULE_FILE = re.compile(r"[0-9]+_\w+/[^./\\][^/\\]*", re.ASCII)


def is_small_file(name: str) -> bool:
    """Whether a file beside the weights belongs to the checkpoint, like the tokenizer and the config.

    Weights in any form, their indexes and hidden files do not.
    """
    return not name.startswith(".") and not name.endswith(".index.json") and Path(name).suffix not in _WEIGHT_SUFFIXES


def is_module_file(name: str) -> bool:
    """Whether a file is in a module folder of a sentence-transformers model.

    Args:
        name: The path within the checkpoint, such as `1_Pooling/config.json`.
    """
    return _MODULE_FILE.fullmatch(name) is not None


def missing_weights(names: Collection[str], where: str | Path) -> NeuralinkError:
    """The error for a checkpoint that has neither a weight file nor a shard index.

    Args:
        names: The files that it has.

    Returns:
        An UnsupportedError if it has pickled weights instead, an InputError if it has none.
    """
    for name in _PICKLES:
        if name in names:
            return UnsupportedError(
                f"has only pickled weights ({name}), which can run code when loaded and are never opened",
                where=where,
                fix="convert them to safetensors, for example with `save_pretrained` of transformers",
            )
    return InputError(f"has neither {SINGLE_FILE} nor {SHARD_INDEX}", where=where)
