"""A HuggingFace checkpoint directory: config, shards and tensors, as validated headers and raw bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from neuralink_cli.checkpoint.header import TensorEntry
from neuralink_cli.checkpoint.json_text import canonical, read_object
from neuralink_cli.checkpoint.tensor_file import TensorFile
from neuralink_cli.errors import InputError, UnsupportedError

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
FLASH_INDEX = "model.flash.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")
_SAMPLE_BYTES = 4096
_SAMPLES = 4


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: the file that holds it and its header entry."""

    file: TensorFile
    entry: TensorEntry


class Checkpoint:
    """An open checkpoint. Use as a context manager; reads may come from any number of threads.

    Raises:
        InputError: Not a checkpoint directory, or a malformed one.
        UnsupportedError: Pickled or quantised weights, or a flash layout.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_config(directory)
        _refuse_quantised(self.config, directory)
        self._stack = ExitStack()
        self.files: tuple[TensorFile, ...] = ()
        self._places: dict[str, TensorPlace] = {}
        try:
            names, listed = _weight_files(directory)
            self.files = tuple(self._stack.enter_context(TensorFile(directory / name)) for name in names)
            for file in self.files:
                self._add(file)
            for name, shard in listed.items():
                if name not in self._places or self._places[name].file.path.name != shard:
                    raise InputError(f"tensor {name!r} is not in {shard}", where=directory / SHARD_INDEX)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def tensors(self) -> Mapping[str, TensorPlace]:
        """All tensors by name."""
        return self._places

    @property
    def model_type(self) -> str:
        """`model_type` of the config."""
        return str(self.config["model_type"])

    @property
    def sharded(self) -> bool:
        """Whether an index file names the shards."""
        return (self.directory / SHARD_INDEX).is_file() and not (self.directory / SINGLE_FILE).is_file()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.entry.nbytes for place in self._places.values())

    def place(self, name: str) -> TensorPlace:
        """Where a tensor lies.

        Raises:
            InputError: The checkpoint does not have it.
        """
        if name not in self._places:
            raise InputError(f"tensor {name!r} is missing", where=self.directory)
        return self._places[name]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that tells checkpoints apart, whatever their sharding; it samples the bytes, it is no checksum.

        Per tensor in name order: a line of canonical JSON `[name, dtype, shape]` and a newline, then the whole
        tensor if it has at most 16,384 bytes, else four samples of 4,096 bytes at floor(k * (size - 4096) / 3).
        """
        digest = hashlib.sha256()
        for name in sorted(self._places):
            file, entry = self._places[name].file, self._places[name].entry
            digest.update(canonical([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
            if entry.nbytes <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read(name).data)
            else:
                for k in range(_SAMPLES):
                    start = k * (entry.nbytes - _SAMPLE_BYTES) // (_SAMPLES - 1)
                    digest.update(file.read(name, start, start + _SAMPLE_BYTES).data)
        return digest.hexdigest()

    def _add(self, file: TensorFile) -> None:
        for entry in file.header.entries:
            if entry.name in self._places:
                other = self._places[entry.name].file.path.name
                raise InputError(f"tensor {entry.name!r} is also in {other}", where=file.path)
            self._places[entry.name] = TensorPlace(file, entry)


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.exists():
        raise InputError("no such directory", where=directory, fix="MODEL is a local HuggingFace checkpoint directory")
    if not directory.is_dir():
        raise InputError("is a file", where=directory, fix="MODEL is the directory that holds config.json")
    if (directory / FLASH_INDEX).is_file():
        raise UnsupportedError(
            "is a flash layout, not a checkpoint",
            where=directory,
            fix="get the checkpoint back with `neuralink restore`",
        )
    if not (directory / "config.json").is_file():
        raise InputError("has no config.json, so it is not a HuggingFace checkpoint", where=directory)
    config = read_object(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError("has no model_type", where=directory / "config.json")
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


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, and the index's map from tensor to shard (empty for a single file)."""
    if (directory / SINGLE_FILE).exists():
        return [SINGLE_FILE], {}
    if (directory / SHARD_INDEX).exists():
        listed = _read_weight_map(directory)
        return sorted(set(listed.values())), listed
    for name in _PICKLES:
        if (directory / name).exists():
            raise UnsupportedError(
                f"has only pickled weights ({name}), which can run code when loaded and are never opened",
                where=directory,
                fix="convert them to safetensors, for example with `save_pretrained` of transformers",
            )
    raise InputError(f"has neither {SINGLE_FILE} nor {SHARD_INDEX}", where=directory)


def _read_weight_map(directory: Path) -> dict[str, str]:
    path = directory / SHARD_INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map", where=path)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_shard_name(shard):
            raise InputError(f"shard name {shard!r} of tensor {tensor!r} is not a plain *.safetensors name", where=path)
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).exists():
            raise InputError(f"shard {shard} is missing", where=directory, fix="download the checkpoint completely")
    return weight_map


def _is_shard_name(name: str) -> bool:
    # Both separators, whatever the system: a checkpoint travels.
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0")
