"""The cache and the read planning of the runtime in C: every decision is that of the package."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.storage.cache import POLICIES, NeuronCache
from neuralink_cli.storage.read_planning import plan_with_gap
from tests.examples.conftest import CRuntime

# No less than sizeof(NlCache).
CACHE_BYTES = 512


class CCache:
    """The cache in C behind the interface of `NeuronCache`."""

    def __init__(self, runtime: CRuntime, neurons: int, capacity: int, pinned: int, policy: str) -> None:
        rules = POLICIES[policy]
        self._library = runtime.shared_library()
        self._library.nl_cache_bytes.restype = ctypes.c_size_t
        size = self._library.nl_cache_bytes(*map(ctypes.c_uint64, (neurons, capacity, pinned)))
        # A mark behind the tables.
        self._memory = np.full(size // 8 + 2, 0x55, dtype=np.int64)
        self._cache = np.zeros(CACHE_BYTES // 8, dtype=np.int64)
        self._library.nl_cache_start(
            _pointer(self._cache),
            _pointer(self._memory),
            *map(ctypes.c_uint64, (neurons, capacity, pinned, rules.run_length)),
            ctypes.c_double(rules.admission),
        )

    def look_up(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        rows = np.empty_like(slots)
        self._library.nl_cache_next(_pointer(self._cache))
        # In two parts, as slots become known.
        for part in (slice(slots.size // 3), slice(slots.size // 3, None)):
            self._library.nl_cache_look_up(
                _pointer(self._cache), _pointer(slots[part]), ctypes.c_size_t(slots[part].size), _pointer(rows[part])
            )
        return rows

    def admit(self, slots: npt.NDArray[np.int32], wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        rows = np.empty_like(slots)
        self._library.nl_cache_admit(
            _pointer(self._cache),
            _pointer(slots),
            _pointer(wanted.astype(np.uint8)),
            ctypes.c_size_t(slots.size),
            _pointer(rows),
        )
        return rows

    def check(self) -> None:
        assert self._memory[-1] == 0x55


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def fired(random: np.random.Generator, neurons: int) -> npt.NDArray[np.int32]:
    """Slots of a token: some hot neurons, some runs, some lone ones."""
    chosen = random.random(neurons) < 0.4 / (1 + np.arange(neurons) / 20)
    for start in random.integers(0, neurons, 4):
        chosen[start : start + random.integers(2, 12)] = True
    return np.flatnonzero(chosen).astype(np.int32)


@pytest.mark.parametrize("policy", ["linked-s3fifo", "s3fifo"])
@pytest.mark.parametrize(
    ("neurons", "capacity", "pinned"),
    [(300, 60, 0), (300, 60, 11), (300, 7, 6), (300, 300, 30), (300, 0, 0), (40, 1, 0)],
)
def test_every_decision_is_that_of_the_cache_in_python(
    c_runtime: CRuntime, policy: str, neurons: int, capacity: int, pinned: int
) -> None:
    ours = CCache(c_runtime, neurons, capacity, pinned, policy)
    theirs = NeuronCache(neurons, capacity, policy=policy, pinned=pinned)
    random = np.random.default_rng(capacity)
    for token in range(400):
        slots = fired(random, neurons)
        rows = theirs.look_up(slots)
        assert (ours.look_up(slots) == rows).all(), token
        plan = plan_with_gap(slots[rows < 0], int(random.integers(0, 4)))
        read = np.concatenate([np.arange(f, f + c, dtype=np.int32) for f, c in zip(plan.first, plan.count, strict=True)]
                              or [np.zeros(0, dtype=np.int32)])  # fmt: skip
        wanted = np.isin(read, slots[rows < 0])
        assert (ours.admit(read, wanted) == theirs.admit(read, wanted)).all(), token
        ours.check()
    assert theirs.hits > 0 or not capacity


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("most", [1, 5, 1000])
def test_reads_are_planned_as_in_python(c_runtime: CRuntime, most: int, parts: int) -> None:
    library = c_runtime.shared_library()
    library.nl_plan_reads.restype = ctypes.c_size_t
    random = np.random.default_rng(most)
    for gap in (0, 1, 7, 5000):
        for share in (0.0, 0.05, 0.5, 1.0):
            slots = np.flatnonzero(random.random(500) < share).astype(np.int32)
            reads = np.zeros((500, 2), dtype=np.int32)
            count = 0
            for part in np.split(slots, sorted(random.integers(0, slots.size + 1, parts - 1).tolist())):
                count = library.nl_plan_reads(
                    _pointer(part),
                    ctypes.c_size_t(part.size),
                    ctypes.c_uint64(gap),
                    ctypes.c_int32(most),
                    _pointer(reads),
                    ctypes.c_size_t(count),
                )
            expected = plan_with_gap(slots, gap)
            if most == 1000:
                assert reads[:count].tolist() == np.stack([expected.first, expected.count], axis=1).tolist()
                continue
            brought = [set(range(first, first + length)) for first, length in reads[:count].tolist()]
            assert all(1 <= len(each) <= most and {min(each), max(each)} <= set(slots.tolist()) for each in brought)
            assert sum(map(len, brought)) == len(set().union(*brought)) <= expected.rows
            assert set(slots.tolist()) <= set().union(*brought)
