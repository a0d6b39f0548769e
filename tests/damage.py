"""Ways to damage a layout, and to change one so that its digests still fit."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import RawTensor

FLASH = "model.flash.safetensors"
INDEX = {"bundled": "model.flash.json", "permuted": "model.permuted.json"}
PLACEMENT = "neuralink/placement.safetensors"
KINDS = ("bundled", "permuted")


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data section starts, and the tensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return 8 + length, header


def start_of(path: Path, tensor: str) -> int:
    data_start, header = header_of(path)
    return int(data_start + header[tensor]["data_offsets"][0])


def flip(path: Path, byte: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


def regions(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and end of everything in a safetensors file: length, header text, padding, each tensor."""
    data_start, header = header_of(path)
    text = len(path.read_bytes()[:data_start].rstrip(b" "))
    yield from ((0, 8), (8, text), (text, data_start))
    for spec in header.values():
        yield data_start + spec["data_offsets"][0], data_start + spec["data_offsets"][1]


def positions_in(path: Path, random: np.random.Generator) -> list[int]:
    """Bytes of every region of a file."""
    if path.suffix != ".safetensors":
        return sorted(random.integers(0, path.stat().st_size, 40).tolist())
    return [int(random.integers(*region)) for region in regions(path) if region[0] < region[1] for _ in range(2)]


def edit(directory: Path, kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index and seal it again, as somebody would who means it."""
    path = directory / INDEX[kind]
    document = json.loads(path.read_text())
    change(document)
    seal(path, document)


def seal(path: Path, document: dict[str, Any]) -> None:
    document.pop("document_sha256", None)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["document_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every number and string in a document, with the way to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from leaves(item, (*path, key))
    elif not isinstance(value, bool) and value is not None:
        yield path, value


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Set a leaf and return what was there."""
    *way, last = path
    for step in way:
        document = document[step]
    before = document[last]
    document[last] = value
    return before


def rewrite_flash(directory: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Write the flash file from other tensors, all ranges and digests of the index fitting it."""
    path = directory / FLASH
    data_start = header_of(path)[0]
    text = json.dumps(header_for(tensors)).encode()
    assert 8 + len(text) <= data_start
    raw = text.ljust(data_start - 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensor.data for tensor in tensors.values()))
    places = header_for(tensors)

    def fit(value: Any) -> None:
        if isinstance(value, dict) and "tensor" in value:
            spec = places[value["tensor"]]
            value.update(
                offset=data_start + spec["data_offsets"][0],
                bytes=spec["data_offsets"][1] - spec["data_offsets"][0],
                shape=spec["shape"],
                dtype=spec["dtype"],
            )
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                fit(item)

    def change(index: dict[str, Any]) -> None:
        fit(index)
        content = path.read_bytes()
        index["file"].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        index["digests"] = {name: hashlib.sha256(tensors[name].data).hexdigest() for name in index["digests"]}

    edit(directory, "bundled", change)


def header_for(tensors: Mapping[str, RawTensor]) -> dict[str, Any]:
    header, position = {}, 0
    for name, tensor in tensors.items():
        stop = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    return header
