"""Every policy against a plain implementation of it, and the budget."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.errors import OptionError
from neuralink_cli.storage import cache_kernels
from neuralink_cli.storage.budget import DramBudget, parse_budget, split_bundles
from neuralink_cli.storage.cache import POLICIES, CachePolicy, NeuronCache

Slots = list[int]
Tokens = list[Slots]


class ReferenceS3FIFO:
    """S3-FIFO by the letter, with deques and dictionaries; `admits` decides about a whole run."""

    def __init__(self, capacity: int, *, run_length: int = 0, take_unwanted: bool = False) -> None:
        self.capacity = capacity
        self.run_length = run_length
        self.take_unwanted = take_unwanted
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghosts: deque[int] = deque(maxlen=capacity - capacity // 10)
        self.frequency: dict[int, int] = {}

    @property
    def resident(self) -> set[int]:
        return set(self.frequency)

    def look_up(self, slots: Slots) -> None:
        for slot in slots:
            if slot in self.frequency:
                self.frequency[slot] = min(self.frequency[slot] + 1, 3)

    def admit(self, slots: Slots, wanted: list[bool]) -> None:
        run: list[tuple[int, bool]] = []
        for slot, needed in [*zip(slots, wanted, strict=True), (10**9, True)]:
            if run and slot != run[-1][0] + 1:
                room = self.capacity - len(self.frequency)
                if not self.run_length or len(run) < self.run_length or room >= len(run):
                    for member, asked in run:
                        if member not in self.frequency and (asked or self.take_unwanted):
                            self._insert(member)
                run = []
            run.append((slot, needed))

    def _insert(self, slot: int) -> None:
        if self.capacity == 0:
            return
        if len(self.frequency) == self.capacity:
            self._evict()
        self.frequency[slot] = 0
        (self.main if slot in self.ghosts else self.small).append(slot)

    def _evict(self) -> None:
        if len(self.small) >= max(self.capacity // 10, 1):
            while self.small:
                slot = self.small.popleft()
                if self.frequency[slot] < 2:
                    del self.frequency[slot]
                    # A ghost that comes back keeps its old place, which is dead: the new one counts.
                    self.ghosts = deque((-1 if ghost == slot else ghost for ghost in self.ghosts), self.ghosts.maxlen)
                    self.ghosts.append(slot)
                    return
                self.frequency[slot] = 0
                self.main.append(slot)
        while True:
            slot = self.main.popleft()
            if self.frequency[slot] == 0:
                del self.frequency[slot]
                self.ghosts = deque((-1 if ghost == slot else ghost for ghost in self.ghosts), self.ghosts.maxlen)
                return
            self.frequency[slot] -= 1
            self.main.append(slot)


class ReferenceRecency:
    """LRU, or a window of tokens: ordered by last use, oldest first."""

    def __init__(self, capacity: int, *, by_token: bool) -> None:
        self.capacity = capacity
        self.by_token = by_token
        self.last_use: dict[int, int] = {}
        self.token = 0

    @property
    def resident(self) -> set[int]:
        return set(self.last_use)

    def look_up(self, slots: Slots) -> None:
        self.token += 1
        for slot in slots:
            if slot in self.last_use:
                del self.last_use[slot]
                self.last_use[slot] = self.token

    def admit(self, slots: Slots, wanted: list[bool]) -> None:
        asked = [s for s, needed in zip(slots, wanted, strict=True) if needed and s not in self.last_use]
        if self.by_token:
            while len(self.last_use) + len(asked) > self.capacity:
                oldest = min(self.last_use.values(), default=self.token)
                if oldest == self.token:
                    break
                self.last_use = {s: t for s, t in self.last_use.items() if t != oldest}
            asked = asked[: self.capacity - len(self.last_use)]
        for slot in asked:
            if len(self.last_use) == self.capacity:
                if not self.last_use:
                    return
                del self.last_use[next(iter(self.last_use))]
            self.last_use[slot] = self.token


NEURONS = 40
token = st.lists(st.integers(0, NEURONS - 1), max_size=14, unique=True).map(sorted)
traces = st.lists(st.tuples(token, token), max_size=40)


def as_slots(slots: Slots) -> npt.NDArray[np.int32]:
    return np.array(slots, dtype=np.int32)


def follow(
    cache: NeuronCache,
    reference: ReferenceS3FIFO | ReferenceRecency,
    trace: list[tuple[Slots, Slots]],
    read_again: bool = False,
) -> None:
    """Run both over a trace of slots used and slots that reads brought along; pool rows must stay consistent.

    With `read_again` all that is used is read, and so offered, even if it is there.
    """
    pool: dict[int, int] = {row: row for row in range(cache.pinned)}
    for used, brought in trace:
        used_free = [slot for slot in used if slot >= cache.pinned]
        before = reference.resident
        rows = cache.look_up(as_slots(used))
        for slot, row in zip(used, rows.tolist(), strict=True):
            assert (row >= 0) == (slot in before or slot < cache.pinned)
            assert row < 0 or pool[row] == slot
        reference.look_up(used_free)
        missing = {slot for slot in used_free if slot not in before}
        asked = set(used_free) if read_again else missing
        read = sorted(asked | {slot for slot in brought if slot >= cache.pinned})
        wanted = [slot in asked for slot in read]
        given_rows = cache.admit(as_slots(read), np.array(wanted, dtype=np.bool_)).tolist()
        reference.admit(read, wanted)
        taken = [row for row in given_rows if row >= 0]
        assert len(set(taken)) == len(taken)
        assert all(cache.pinned <= row < cache.capacity for row in taken)
        pool.update({row: slot for slot, row in zip(read, given_rows, strict=True) if row >= 0})
        assert set(cache.resident.tolist()) == reference.resident | set(range(cache.pinned))


@given(
    trace=traces,
    capacity=st.integers(0, 30),
    run_length=st.sampled_from([0, 2, 3]),
    unwanted=st.booleans(),
    read_again=st.booleans(),
)
def test_s3_fifo_is_what_it_says(
    trace: list[tuple[Slots, Slots]], capacity: int, run_length: int, unwanted: bool, read_again: bool
) -> None:
    policy = CachePolicy(cache_kernels.S3FIFO, run_length=run_length, admission=0.0, take_unwanted=unwanted)
    cache = NeuronCache(NEURONS, capacity, policy=policy)
    follow(cache, ReferenceS3FIFO(capacity, run_length=run_length, take_unwanted=unwanted), trace, read_again)


@given(
    trace=traces,
    capacity=st.integers(0, 30),
    pinned=st.integers(0, 6),
    by_token=st.booleans(),
    read_again=st.booleans(),
)
def test_lru_and_window_are_what_they_say(
    trace: list[tuple[Slots, Slots]], capacity: int, pinned: int, by_token: bool, read_again: bool
) -> None:
    cache = NeuronCache(NEURONS, capacity + pinned, policy="window" if by_token else "lru", pinned=pinned)
    follow(cache, ReferenceRecency(capacity, by_token=by_token), trace, read_again)


@given(trace=traces, pinned=st.integers(0, 6))
def test_pinned_neurons_stay_and_count(trace: list[tuple[Slots, Slots]], pinned: int) -> None:
    policy = CachePolicy(cache_kernels.S3FIFO)
    follow(NeuronCache(NEURONS, 12 + pinned, policy=policy, pinned=pinned), ReferenceS3FIFO(12), trace)


def test_long_sequences_agree_too() -> None:
    random = np.random.default_rng(1)
    hot = random.random(NEURONS) ** 3
    trace = [(np.flatnonzero(random.random(NEURONS) < hot).tolist(), [5, 6, 7]) for _ in range(600)]
    follow(NeuronCache(NEURONS, 15, policy="s3fifo"), ReferenceS3FIFO(15), trace)
    follow(NeuronCache(NEURONS, 15, policy="lru"), ReferenceRecency(15, by_token=False), trace)
    follow(NeuronCache(NEURONS, 15, policy="window"), ReferenceRecency(15, by_token=True), trace)


def test_a_run_enters_whole_or_not_and_as_often_as_it_should() -> None:
    entered = 0
    policy = CachePolicy(cache_kernels.S3FIFO, run_length=3, admission=0.25)
    cache = NeuronCache(60_000, 1_000, policy=policy)
    full = as_slots(list(range(50_000, 51_000)))
    cache.admit(full, np.ones(1_000, dtype=np.bool_))
    for start in range(0, 8000, 8):
        slots = as_slots([start, start + 1, start + 2, start + 4, start + 5])
        cache.look_up(slots)
        rows = cache.admit(slots, np.ones(5, dtype=np.bool_)) >= 0
        assert rows[3:].all()
        assert rows[:3].all() or not rows[:3].any()
        entered += int(rows[0])
    assert 200 < entered < 300


def test_the_default_admits_one_run_of_two_in_ten_and_every_lone_neuron() -> None:
    cache = NeuronCache(60_000, 1_000)
    cache.admit(as_slots(list(range(50_000, 51_000))), np.ones(1_000, dtype=np.bool_))
    pairs, lone = 0, 0
    for start in range(0, 8000, 8):
        slots = as_slots([start, start + 1, start + 4])
        cache.look_up(slots)
        first, second, third = (cache.admit(slots, np.ones(3, dtype=np.bool_)) >= 0).tolist()
        assert first == second
        pairs += first
        lone += third
    assert lone == 1000
    assert 70 < pairs < 130


def splitmix(mixed: int) -> int:
    """The finaliser of SplitMix64, in whole numbers."""
    word = 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % word
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % word
    return mixed ^ mixed >> 31


@given(token=st.integers(1, 50), slot=st.integers(0, 2**31 - 1), seed=st.integers(0, 2**31 - 1))
def test_chances_come_from_token_slot_and_seed_as_splitmix_mixes_them(token: int, slot: int, seed: int) -> None:
    cache = NeuronCache(1, 1, seed=seed)
    for _ in range(token):
        cache.look_up(as_slots([]))
    mixed = token * 0x9E3779B97F4A7C15 % 2**64 ^ (slot * 0xD1B54A32D192ED03 + seed) % 2**64
    assert cache_kernels._chance(cache._state, slot) == splitmix(mixed) >> 32


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_again_gives_the_same(policy: str) -> None:
    def history(**seed: int) -> list[Slots]:
        random = np.random.default_rng(3)
        cache = NeuronCache(200, 30, policy=policy, **seed)
        result = []
        for _ in range(100):
            slots = np.flatnonzero(random.random(200) < 0.15).astype(np.int32)
            missing = slots[cache.look_up(slots) < 0]
            result.append(cache.admit(missing, np.ones(missing.size, dtype=np.bool_)).tolist())
        return result

    assert history(seed=0) == history(seed=0) == history()
    assert (history(seed=0) == history(seed=1)) == (policy != "linked-s3fifo")


def test_counts_hits() -> None:
    cache = NeuronCache(10, 5, policy="lru", pinned=1)
    assert cache.hit_rate == 0.0
    cache.look_up(as_slots([0, 3]))
    cache.admit(as_slots([3]), np.ones(1, dtype=np.bool_))
    cache.look_up(as_slots([3, 4]))
    assert (cache.looked_up, cache.hits, cache.hit_rate) == (4, 2, 0.5)


def test_a_cache_of_nothing_admits_nothing() -> None:
    for policy in POLICIES:
        cache = NeuronCache(10, 0, policy=policy)
        assert cache.look_up(as_slots([1, 5])).tolist() == [-1, -1]
        assert cache.admit(as_slots([1, 5]), np.ones(2, dtype=np.bool_)).tolist() == [-1, -1]


def test_wrong_caches_are_refused() -> None:
    with pytest.raises(OptionError, match="'fifo' is not one of linked-s3fifo, s3fifo"):
        NeuronCache(10, 5, policy="fifo")
    with pytest.raises(OptionError, match="a cache of 5 neurons does not hold the 6 pinned ones"):
        NeuronCache(10, 5, pinned=6)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5%", DramBudget(fraction=0.05)),
        ("12.5 %", DramBudget(fraction=0.125)),
        ("64MB", DramBudget(bytes=64_000_000)),
        ("1.5GiB", DramBudget(bytes=3 * 2**29)),
        ("4096", DramBudget(bytes=4096)),
        ("0", DramBudget(bytes=0)),
    ],
)
def test_budgets_as_users_write_them(text: str, budget: DramBudget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "much", "-5%", "5%%", "ib", "5 parsecs", "1e9"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(OptionError, match="is not a valid size"):
        parse_budget(text)


def test_a_budget_is_split_by_neurons() -> None:
    assert split_bundles(DramBudget(fraction=0.1), [100, 50], [10, 10], [0, 0]) == (10, 5)
    assert split_bundles(DramBudget(bytes=300), [100, 50], [10, 10], [0, 0]) == (20, 10)
    assert split_bundles(DramBudget(fraction=7.0), [100, 50], [10, 20], [5, 5]) == (100, 50)
    assert split_bundles(DramBudget(bytes=0), [100, 50], [10, 10], [5, 5]) == (0, 0)


@given(
    neurons=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_the_minimum_named_is_enough(neurons: list[int], share: float, data: st.DataObject) -> None:
    pinned = [data.draw(st.integers(0, n)) for n in neurons]
    strides = [data.draw(st.integers(1, 5000)) for _ in neurons]
    total = sum(n * s for n, s in zip(neurons, strides, strict=True))
    try:
        capacities = split_bundles(DramBudget(bytes=max(int(share * total), 1)), neurons, strides, pinned)
    except OptionError as error:
        assert error.fix is not None
        least = int(error.fix.split("at least ")[1].split(" bytes")[0].replace(",", ""))
        capacities = split_bundles(DramBudget(bytes=least), neurons, strides, pinned)
        with pytest.raises(OptionError):
            split_bundles(DramBudget(bytes=least - 1), neurons, strides, pinned)
    assert all(min(p + 1, n) <= c <= n for p, c, n in zip(pinned, capacities, neurons, strict=True))
    assert sum(c * s for c, s in zip(capacities, strides, strict=True)) <= total


@given(neurons=st.lists(st.integers(200, 5000), min_size=1, max_size=4), share=st.floats(0.01, 0.9))
def test_a_share_holds_the_same_share_of_pinned_neurons(neurons: list[int], share: float) -> None:
    pinned = [int(n * share) for n in neurons]
    # Whole bytes of the share may be one byte short of it.
    strides = [4096] * len(neurons)
    capacities = split_bundles(DramBudget(fraction=share + 1e-9), neurons, strides, pinned)
    assert all(c <= max(n * share, p) + 1 for p, c, n in zip(pinned, capacities, neurons, strict=True))
