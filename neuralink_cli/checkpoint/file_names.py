"""The file names of a checkpoint, and which files are weights, small files or modules."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_FILE = "config.json"
# Where NVIDIA's ModelOpt says how it quantised the weights.
QUANTISED_CONFIG = "hf_quant_config.json"
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
FLASH_INDEX = "model.flash.json"
_WEIGHT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"),
        *(".onnx", ".onnx_data", ".gguf", ".ot", ".pkl", ".tflite"),
    )
)
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
