"""Reads a checkpoint's config.json, and refuses checkpoints that it alone shows to be unusable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.contents import missing_config, refuse_adapter, refuse_dangling_link
from neuralink_cli.checkpoint.file_names import CONFIG_FILE, FLASH_INDEX, QUANTISED_CONFIG
from neuralink_cli.checkpoint.scaled_tensors import WAY_OUT, may_have_scales
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.files.json_text import read_foreign_object

_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A value from a config, or from its `text_config` if the config describes several models."""
    if key in config:
        return config[key]
    text = config.get("text_config")
    return text.get(key) if isinstance(text, dict) else None


def stated_positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a config says that its model has; None if it says nothing of it."""
    stated = (config_value(config, key) for key in _POSITION_KEYS)
    return next((value for value in stated if type(value) is int and value > 0), None)


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a checkpoint. Refuses checkpoints that it alone shows to be unusable.

    Raises:
        InputError: Not a checkpoint directory, or a malformed config.
        UnsupportedError: Weights quantised in a way that is not understood, an adapter beside them, or a flash layout.
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
    names = {child.name for child in directory.iterdir()}
    refuse_adapter(names, directory)
    refuse_dangling_link(directory / CONFIG_FILE)
    if not (directory / CONFIG_FILE).is_file():
        raise missing_config(names, directory)
    config = read_foreign_object(directory / CONFIG_FILE)
    if not isinstance(config.get("model_type"), str):
        raise InputError(
            "has no model_type",
            where=directory / CONFIG_FILE,
            fix='add what transformers calls its architecture, like "model_type": "llama"',
        )
    _refuse_quantised(config, directory)
    return config


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it, and the configs in it, say of quantisation."""
    return {
        key: plain_config(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _QUANTISATION_KEYS
    }


def stated_quantization(config: Mapping[str, Any]) -> Any:
    """What a config, or that of a model within the model, says of quantisation; nothing if it says nothing."""
    for key in _QUANTISATION_KEYS:
        if config.get(key):
            return config[key]
    parts = (value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))
    return next((found for part in parts if (found := stated_quantization(part))), None)


def _refuse_quantised(config: dict[str, Any], directory: Path) -> None:
    quantization = stated_quantization(config)
    if (directory / QUANTISED_CONFIG).is_file():
        found = read_foreign_object(directory / QUANTISED_CONFIG).get("quantization")
        method = found.get("quant_algo", "unknown") if isinstance(found, dict) else "unknown"
        # Null where only the cache of keys and values is quantised.
        quantization = quantization or ({"quant_method": method} if method is not None else None)
    if quantization and not may_have_scales(quantization):
        raise quantised_error(quantization, directory)


def quantised_error(quantization: Any, directory: Path) -> UnsupportedError:
    """What to raise for a checkpoint that is quantised in a way that is not understood."""
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    return UnsupportedError(
        f"is quantised ({method}): packed weights have no neuron rows to reorder", where=directory, fix=WAY_OUT
    )
