"""A checkpoint's config.json, checked as far as it alone decides whether the checkpoint can be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.file_names import CONFIG_FILE, FLASH_INDEX
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.files.json_text import read_object


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A value of a config, or of the part of it that describes the text model of several."""
    if key in config:
        return config[key]
    text = config.get("text_config")
    return text.get(key) if isinstance(text, dict) else None


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a checkpoint, checked as far as it alone decides whether the checkpoint can be used.

    Raises:
        InputError: Not a checkpoint directory, or a malformed config.
        UnsupportedError: Quantised weights, or a flash layout.
    """
    require_reachable(directory)
    if not directory.exists():
        raise InputError(
            "no such directory",
            where=directory,
            fix="MODEL is a local HuggingFace checkpoint directory, or a hub id like org/name",
        )
    if not directory.is_dir():
        raise InputError("is a file", where=directory, fix="MODEL is the directory that holds config.json")
    if (directory / FLASH_INDEX).is_file():
        raise UnsupportedError(
            "is a flash layout, not a checkpoint",
            where=directory,
            fix="get the checkpoint back with `neuralink restore`",
        )
    if not (directory / CONFIG_FILE).is_file():
        raise InputError(f"has no {CONFIG_FILE}, so it is not a HuggingFace checkpoint", where=directory)
    config = read_object(directory / CONFIG_FILE)
    if not isinstance(config.get("model_type"), str):
        raise InputError("has no model_type", where=directory / CONFIG_FILE)
    _refuse_quantised(config, directory)
    return config


def _refuse_quantised(config: dict[str, Any], directory: Path) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedError(
            f"is quantised ({method}): packed weights have no neuron rows that could be moved",
            where=directory,
            fix="lay out the unquantised checkpoint (--layout permuted) and quantise the result",
        )
