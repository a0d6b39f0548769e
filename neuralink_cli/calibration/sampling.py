"""Samples drawn at random from all of a dataset, in one pass and in little memory."""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

# A sample by its number, and what makes its bytes.
Record = tuple[int, Callable[[], bytes]]


def draw_key(seed: int, number: int) -> int:
    """What a sample is ordered by: the first 8 bytes, big-endian, of the SHA-256 of `SEED:NUMBER`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big")


def draw(records: Iterable[Record], seed: int, count: int | None) -> Iterator[bytes]:
    """The `count` samples with the least keys, in the order of their keys; all of them if `count` is None.

    The bytes of samples wait in a file without a name, in the system's temporary folder.
    """
    with tempfile.TemporaryFile() as file:
        places = _all(records, seed, file) if count is None else _least(records, seed, count, file)
        for offset, size in places:
            file.seek(offset)
            yield file.read(size)


def _all(records: Iterable[Record], seed: int, file: IO[bytes]) -> Iterator[tuple[int, int]]:
    keys, starts, end = array("Q"), array("Q"), 0
    for number, make in records:
        keys.append(draw_key(seed, number))
        starts.append(end)
        end += file.write(make())
    starts.append(end)
    order = np.argsort(np.array(keys, dtype=np.uint64), kind="stable").tolist()
    return ((starts[place], starts[place + 1] - starts[place]) for place in order)


def _least(records: Iterable[Record], seed: int, count: int, file: IO[bytes]) -> Iterator[tuple[int, int]]:
    # The greatest of those that are kept comes first: it is the next to go.
    kept: list[tuple[int, int, int, int]] = []
    end = 0
    for number, make in records:
        key = draw_key(seed, number)
        if len(kept) == count and key >= -kept[0][0]:
            continue
        size = file.write(make())
        place = (-key, -number, end, size)
        end += size
        if len(kept) < count:
            heapq.heappush(kept, place)
        else:
            heapq.heapreplace(kept, place)
    return ((offset, size) for _, _, offset, size in sorted(kept, reverse=True))
