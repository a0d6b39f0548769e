"""A HuggingFace checkpoint directory: config, shards and tensors, as validated headers and raw bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from neuralink_cli.checkpoint.header import TensorEntry
from neuralink_cli.checkpoint.json_text import canonical, read_object
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.checkpoint.tensor_file import TensorFile
from neuralink_cli.errors import InputError, UnsupportedError

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
_SAMPLE_BYTES = 4096
_SAMPLES = 4


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: the file that holds it and its header entry."""

    file: TensorFile
    entry: TensorEntry


class Checkpoint:
    """An open checkpoint. Use as a context manager; reads may come from any number of threads.

    Args:
        origin: Where the directory came from, if it is not simply a local one.

    Raises:
        InputError: Not a checkpoint directory, or a malformed one.
        UnsupportedError: Pickled or quantised weights, or a flash layout.
    """

    def __init__(self, directory: Path, origin: Origin | None = None) -> None:
        self.directory = directory
        self.origin = origin
        self.config = read_config(directory)
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


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a checkpoint, checked as far as it alone decides whether the checkpoint can be used.

    Raises:
        InputError: Not a checkpoint directory, or a malformed config.
        UnsupportedError: Quantised weights, or a flash layout.
    """
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


def is_small_file(name: str) -> bool:
    """Whether a file beside the weights belongs to the checkpoint, as tokenizer and config do.

    Weights in any form, their indexes and hidden files do not.
    """
    return not name.startswith(".") and not name.endswith(".index.json") and Path(name).suffix not in _WEIGHT_SUFFIXES


def is_module_file(name: str) -> bool:
    """Whether a file lies in the folder of one of the modules that a sentence-transformers model goes on with.

    Args:
        name: Relative to the checkpoint, as `1_Pooling/config.json`.
    """
    return _MODULE_FILE.fullmatch(name) is not None


def read_weight_map(path: Path) -> dict[str, str]:
    """The shard of every tensor, from the index of a sharded checkpoint; whether the shards are there is not looked at.

    Raises:
        InputError: It is malformed, or names a shard that is not a plain file name.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map", where=path)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_shard_name(shard):
            raise InputError(f"shard name {shard!r} of tensor {tensor!r} is not a plain *.safetensors name", where=path)
    return weight_map


def refuse_without_weights(names: Collection[str], where: str | Path) -> NoReturn:
    """Say what is wrong with a checkpoint that has neither a weight file nor an index of shards.

    Args:
        names: The files that it does have.

    Raises:
        UnsupportedError: It has pickled weights instead.
        InputError: It has none.
    """
    for name in _PICKLES:
        if name in names:
            raise UnsupportedError(
                f"has only pickled weights ({name}), which can run code when loaded and are never opened",
                where=where,
                fix="convert them to safetensors, for example with `save_pretrained` of transformers",
            )
    raise InputError(f"has neither {SINGLE_FILE} nor {SHARD_INDEX}", where=where)


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
        listed = read_weight_map(directory / SHARD_INDEX)
        shards = sorted(set(listed.values()))
        for shard in shards:
            if not (directory / shard).exists():
                raise InputError(f"shard {shard} is missing", where=directory, fix="download the checkpoint completely")
        return shards, listed
    refuse_without_weights({child.name for child in directory.iterdir()}, directory)


def _is_shard_name(name: str) -> bool:
    # Both separators, whatever the system: a checkpoint travels.
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0")
