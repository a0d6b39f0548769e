"""The files passed between stages (trace, placement): plain safetensors with one metadata document and a digest.

`__metadata__` has the single key `neuralink`, a canonical JSON document with at least `format`, `version`, `tool` and
`content_sha256`, the SHA-256 of the data section followed by the canonical document without this key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli import __version__
from neuralink_cli.errors import InputError, advising
from neuralink_cli.files.durable import new_file, require_free, require_space, write_all
from neuralink_cli.files.header import Header, build_header, tensor_bytes
from neuralink_cli.files.json_text import canonical, parse_object
from neuralink_cli.files.replacing import JSON, foreign_file, looks_like
from neuralink_cli.files.schema import Schema, check_document
from neuralink_cli.files.tensor_file import TensorFile

METADATA_KEY = "neuralink"
# The commands whose outputs stage files are, by kind.
_MADE_BY = {"trace": "profile", "placement": "cluster"}
DIGEST_KEY = "content_sha256"
FORMAT_VERSION = 1
ALIGNMENT = 4096
_CHUNK = 1 << 24

_DTYPES: Mapping[str, str] = {"U8": "|u1", "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8"}
_NAMES = {np.dtype(spelling): name for name, spelling in _DTYPES.items()}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to be written: `chunks()` yields its data in order, as C-contiguous arrays of any shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[npt.NDArray[Any]]]


def array_tensor(name: str, array: npt.NDArray[Any]) -> StreamedTensor:
    """A tensor that is already in memory. Its dtype must be one that stage files use."""
    return StreamedTensor(name, _NAMES[array.dtype], array.shape, lambda: [np.ascontiguousarray(array)])


def write_stage_file(
    path: Path,
    schema: Schema,
    document: Mapping[str, Any],
    tensors: Sequence[StreamedTensor],
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> str:
    """Write a stage file, durably and reproducibly, and return its `content_sha256`.

    Args:
        schema: The schema of the document; its kind gives the `format`.
        document: The metadata, without the keys that this function adds; dataclasses stand for their fields.
        progress: Called with the bytes written since the last call.

    Raises:
        OutputError: The output exists, does not fit on the disk or cannot be written.
    """
    require_stage_output(path, overwrite)
    specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    whole = _whole(schema.kind, document)
    # What is written here can be read by the next stage.
    check_document(parse_object(canonical({**whole, DIGEST_KEY: "0" * 64}), path), schema, path)
    size, data_start = _sizes(_header(specs, whole, "0" * 64))
    require_space(path, size)
    digest = hashlib.sha256()
    with new_file(path, overwrite=overwrite) as handle:
        handle.seek(data_start)
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                data = chunk.reshape(-1).view(np.uint8).data
                digest.update(data)
                write_all(handle, data)
                written += len(data)
                if progress is not None:
                    progress(len(data))
            if written != tensor_bytes(tensor.dtype, tensor.shape):
                raise ValueError(f"tensor {tensor.name!r} got {written} bytes")
        digest.update(canonical(whole).encode())
        # The header is written last: until then nothing can open the file.
        handle.seek(0)
        write_all(handle, _header(specs, whole, digest.hexdigest()).prelude)
    return digest.hexdigest()


def require_stage_output(path: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """As `require_free`; and whatever `--overwrite` says, the weights or the JSON files of a model are not replaced.

    Raises:
        OutputError: The output must not be written, as `require_free`, or is such a file.
    """
    require_free(path, overwrite, inputs=inputs)
    if not path.is_file():
        return
    try:
        with TensorFile(path) as found:
            foreign = None if METADATA_KEY in found.header.metadata else "weights"
    except InputError:
        # No tensors: an earlier output that is damaged may be replaced.
        foreign = JSON if looks_like(path) == JSON else None
    if foreign is not None:
        raise foreign_file(path, f"holds {foreign}")


class StageFile(TensorFile):
    """An open trace or placement: a tensor file whose metadata document has been checked against its schema.

    Raises:
        InputError: Not a safetensors file, of another kind, of a newer version, or with a malformed document.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        with advising(f"pass the file that `neuralink {_MADE_BY[schema.kind]}` wrote"):
            super().__init__(path)
            try:
                self.document = self._checked_document(schema)
            except InputError:
                self.close()
                raise

    @property
    def content_sha256(self) -> str:
        """The digest of data and document, as the document states it."""
        return str(self.document[DIGEST_KEY])

    def array(self, name: str, dtype: str) -> npt.NDArray[Any]:
        """A whole tensor as an array of the dtype it must have.

        Raises:
            InputError: The tensor is missing or of another dtype.
        """
        entry = self.entry(name)
        if entry.dtype != dtype:
            raise InputError(f"tensor {name!r} has dtype {entry.dtype}, not {dtype}", where=self.path)
        return self.read(name).view(_DTYPES[dtype]).reshape(entry.shape)

    def read_whole(self) -> bytes:
        """All bytes of the file."""
        whole = np.empty(self.size, dtype=np.uint8)
        self.read_at(0, whole)
        return whole.tobytes()

    def check_content(self) -> None:
        """Read the whole file and compare its digest.

        Raises:
            InputError: The file was damaged after it was written.
        """
        digest = hashlib.sha256()
        buffer = np.empty(_CHUNK, dtype=np.uint8)
        position, end = self.header.data_start, self.header.file_bytes
        while position < end:
            part = buffer[: min(_CHUNK, end - position)]
            self.read_at(position, part)
            digest.update(part.data)
            position += part.nbytes
        stated = {key: value for key, value in self.document.items() if key != DIGEST_KEY}
        digest.update(canonical(stated).encode())
        if digest.hexdigest() != self.content_sha256:
            raise InputError("is damaged: its content does not match its digest", where=self.path, fix="make it again")

    def _checked_document(self, schema: Schema) -> dict[str, Any]:
        text = self.header.metadata.get(METADATA_KEY)
        if text is None:
            raise InputError(f"is not a {schema.kind} file (no {METADATA_KEY!r} metadata)", where=self.path)
        document = parse_object(text, self.path)
        # Once is enough.
        self.header = replace(self.header, metadata={})
        expected = f"neuralink-{schema.kind}"
        if document.get("format") != expected:
            raise InputError(
                f"is a {document.get('format')!r} file, but a {expected!r} file is needed",
                where=self.path,
            )
        if document.get("version") != FORMAT_VERSION:
            raise InputError(
                f"has format version {document.get('version')!r}, but this tool reads {FORMAT_VERSION}", where=self.path
            )
        check_document(document, schema, self.path)
        return document


def _whole(kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it is written, without its digest."""
    added = {"format": f"neuralink-{kind}", "version": FORMAT_VERSION, "tool": f"neuralink {__version__}"}
    return {**document, **added}


def _sizes(header: Header) -> tuple[int, int]:
    """Bytes of the file, and where its data starts; the header itself takes memory if there are thousands of blocks."""
    return header.file_bytes, header.data_start


def _header(specs: Sequence[tuple[str, str, Sequence[int]]], whole: Mapping[str, Any], digest: str) -> Header:
    return build_header(specs, {METADATA_KEY: canonical({**whole, DIGEST_KEY: digest})}, alignment=ALIGNMENT)
