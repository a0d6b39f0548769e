"""A HuggingFace checkpoint directory: config, shards and tensors, as validated headers and raw bytes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType

from neuralink_cli.checkpoint.companions import left_out_files
from neuralink_cli.checkpoint.config import quantised_error, read_config, stated_quantization
from neuralink_cli.checkpoint.contents import missing_weights, refuse_dangling_link
from neuralink_cli.checkpoint.file_names import SHARD_INDEX, SINGLE_FILE
from neuralink_cli.checkpoint.mxfp4_stacks import find_stacks
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.checkpoint.packed_tensors import PackedTensor, as_unpacked, find_packed_tensors, shapes_of
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor, Shape, find_scaled_tensors
from neuralink_cli.errors import InputError
from neuralink_cli.files.header import TensorEntry
from neuralink_cli.files.input_file import read_input, require_regular
from neuralink_cli.files.json_text import canonical, read_foreign_object
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.streaming.pipeline import FileRange

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 4096
_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor is stored: its file and its header entry.

    Attributes:
        byte_bits: How many bits of the file there are for a byte of the tensor: fewer than 8 if its codes are packed.
    """

    file: TensorFile
    entry: TensorEntry
    byte_bits: int = 8

    @property
    def offset(self) -> int:
        """Where its bytes start in the file."""
        return self.file.header.offset_of(self.entry)

    def stretch(self, start: int, stop: int) -> FileRange:
        """What to read for bytes `start` to `stop` of the tensor; of packed codes, whole bytes that hold them."""
        first, last = start * self.byte_bits // 8, -(-stop * self.byte_bits // 8)
        return FileRange(self.file, self.offset + first, last - first)


class Checkpoint:
    """An open checkpoint. Use as a context manager; reads may come from any number of threads.

    Args:
        origin: The hub model that the directory came from; None for a local directory.

    Attributes:
        packed: The weights whose codes are packed, by the name that they would have unpacked; `tensors` has them so.
        scaled: The weights that are numbers only together with scales, by name.

    Raises:
        InputError: Not a checkpoint directory, or a malformed one.
        UnsupportedError: Pickled weights, weights quantised in a way that is not understood, or a flash layout.
    """

    def __init__(self, directory: Path, origin: Origin | None = None) -> None:
        self.directory = directory
        self.origin = origin
        self.config = read_config(directory)
        self._stack = ExitStack()
        self.files: tuple[TensorFile, ...] = ()
        # As the files have them, and with packed codes as they would be unpacked.
        self._stored: dict[str, TensorPlace] = {}
        self._places: Mapping[str, TensorPlace] = self._stored
        self.packed: Mapping[str, PackedTensor] = {}
        self._beside: dict[str, bytes] = {}
        beside = _files_beside(directory)
        try:
            names, listed = _weight_files(directory)
            _refuse_dangling_links(directory, beside, names)
            self.files = tuple(self._stack.enter_context(TensorFile(directory / name)) for name in names)
            for file in self.files:
                self._add(file)
            self._compare_with_index(listed)
            self._unpack()
            self.scaled = self._find_scaled()
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
        """All tensors by name; those whose codes are packed as if they were not."""
        return self._places

    @property
    def model_type(self) -> str:
        """`model_type` of the config."""
        return str(self.config["model_type"])

    @cached_property
    def sharded(self) -> bool:
        """Whether this is a sharded checkpoint, with an index that lists the shards."""
        return (self.directory / SHARD_INDEX).is_file() and not (self.directory / SINGLE_FILE).is_file()

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weight files and, if there are several, of their index."""
        return (*(file.path.name for file in self.files), *([SHARD_INDEX] if self.sharded else []))

    def read_beside(self, name: str) -> bytes:
        """The content of a small file beside the weights. It is read once, so that all who ask get the same.

        Raises:
            InputError: It cannot be read.
        """
        if name not in self._beside:
            self._beside[name] = read_input(self.directory / name)
        return self._beside[name]

    @property
    def scales(self) -> frozenset[str]:
        """The tensors that only weights with scales need: their scales, and the shapes of packed ones."""
        return frozenset(tensor.scales for tensor in self.scaled.values()) | shapes_of(self.packed)

    def scale_bytes(self, name: str, weights: int) -> int:
        """Bytes that the scales of so many weights of a tensor take, stored and as float32; 0 if it has none."""
        tensor = self.scaled.get(name)
        if tensor is None:
            return 0
        entry = self.place(tensor.scales).entry
        return (entry.nbytes + 4 * prod(entry.shape)) * weights // (tensor.rows * tensor.columns)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(place.entry.nbytes for place in self._stored.values())

    def place(self, name: str) -> TensorPlace:
        """Where a tensor is stored.

        Raises:
            InputError: The checkpoint has no such tensor.
        """
        if name not in self._places:
            raise InputError(f"tensor {name!r} is missing", where=self.directory)
        return self._places[name]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies a checkpoint, however it is sharded. It samples the bytes; it is not a checksum.

        Per tensor in name order: a line of canonical JSON `[name, dtype, shape]` and a newline, then the whole
        tensor if it has at most 16,384 bytes, else four samples of 4,096 bytes at floor(k * (size - 4096) / 3).
        """
        digest = hashlib.sha256()
        for name in sorted(self._stored):
            file, entry = self._stored[name].file, self._stored[name].entry
            digest.update(canonical([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
            if entry.nbytes <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read(name).data)
            else:
                for k in range(_SAMPLES):
                    start = k * (entry.nbytes - _SAMPLE_BYTES) // (_SAMPLES - 1)
                    digest.update(file.read(name, start, start + _SAMPLE_BYTES).data)
        return digest.hexdigest()

    def _unpack(self) -> None:
        """Find the weights whose codes are packed, and put them in the place of what holds their codes."""
        self.packed = find_packed_tensors(
            stated_quantization(self.config),
            _shapes(self._stored),
            lambda name: self._stored[name].file.read(name),
            self.directory,
        )
        if self.packed:
            bits = {tensor.name: tensor.bits for tensor in self.packed.values()}
            self._places = {
                entry.name: TensorPlace(file, entry, bits.get(entry.name, 8))
                for file in self.files
                for entry in as_unpacked(file.header.entries, self.packed)
            }

    def _find_scaled(self) -> Mapping[str, ScaledTensor]:
        quantization = stated_quantization(self.config)
        found = find_scaled_tensors(quantization, _shapes(self._places), self.directory, shapes_of(self.packed))
        found |= find_stacks(quantization, _shapes(self._stored), self.directory)
        if quantization and not found:
            raise quantised_error(quantization, self.directory)
        return found

    def _compare_with_index(self, listed: Mapping[str, str]) -> None:
        """Check that tensors are where the index says. Some are nowhere: then the model has to do without them."""
        for name, shard in listed.items():
            if name in self._stored and self._stored[name].file.path.name != shard:
                raise InputError(
                    f"says that tensor {name!r} is in {shard}, but it is in {self._stored[name].file.path.name}",
                    where=self.directory / SHARD_INDEX,
                )
        absent = [name for name in listed if name not in self._stored]
        if absent:
            more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
            logger.info("%s names %r%s, which no shard has", self.directory / SHARD_INDEX, absent[0], more)

    def _add(self, file: TensorFile) -> None:
        for entry in file.header.entries:
            if entry.name in self._stored:
                other = self._stored[entry.name].file.path.name
                # Even with the same bytes: which of them a reader takes would depend on the reader.
                raise InputError(
                    f"tensor {entry.name!r} is also in {other}",
                    where=file.path,
                    fix="keep it in one of the two, the one that the index names: load the model and save it again",
                )
            self._stored[entry.name] = TensorPlace(file, entry)


def _shapes(places: Mapping[str, TensorPlace]) -> dict[str, Shape]:
    return {name: (place.entry.dtype, place.entry.shape) for name, place in places.items()}


def read_weight_map(path: Path) -> dict[str, str]:
    """The shard of every tensor, from the index of a sharded checkpoint. Does not check that the shards exist.

    Raises:
        InputError: The index is malformed, or a shard's name is not a plain file name.
    """
    weight_map = read_foreign_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map", where=path)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_shard_name(shard):
            raise InputError(
                f"shard name {shard!r} of tensor {tensor!r} is not a plain *.safetensors name",
                where=path,
                fix="put the shards beside the index, and name them there without folders",
            )
    return weight_map


def _files_beside(directory: Path) -> list[str]:
    """Names of the files in a checkpoint's directory that are not hidden.

    Raises:
        InputError: There is a pipe or device among them, which a library would wait for.
    """
    try:
        beside = [child for child in directory.iterdir() if not child.name.startswith(".") and not child.is_dir()]
    except OSError as error:
        raise InputError(f"cannot be listed ({error.strerror})", where=error.filename) from None
    for child in beside:
        require_regular(child)
    return [child.name for child in beside]


def _refuse_dangling_links(directory: Path, beside: Sequence[str], weights: Sequence[str]) -> None:
    """Check that what a library would read is there: it takes a link to nothing for a file that there is not.

    Raises:
        InputError: There is a link to nothing.
    """
    left_out = left_out_files([*beside, *weights], weights)
    for name in beside:
        if name not in left_out:
            refuse_dangling_link(directory / name)


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, and the shard of every tensor (empty for a single file)."""
    for name in (SINGLE_FILE, SHARD_INDEX):
        refuse_dangling_link(directory / name)
    if (directory / SINGLE_FILE).exists():
        return [SINGLE_FILE], {}
    if (directory / SHARD_INDEX).exists():
        listed = read_weight_map(directory / SHARD_INDEX)
        shards = sorted(set(listed.values()))
        for shard in shards:
            refuse_dangling_link(directory / shard)
            if not (directory / shard).exists():
                raise InputError(f"shard {shard} is missing", where=directory, fix="download the whole checkpoint")
        return shards, listed
    raise missing_weights({child.name for child in directory.iterdir()}, directory)


def _is_shard_name(name: str) -> bool:
    # Both path separators on every system: checkpoints are copied between systems.
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0")
