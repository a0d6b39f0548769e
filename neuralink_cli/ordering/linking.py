"""Linking: joins neurons that fire together into paths, the strongest pairs first (the paper's Algorithm 1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Neurons
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.kernels import available_cpus, kernel
from neuralink_cli.ordering.counting import STRIPE, Counts, count_dtype, count_together
from neuralink_cli.placement.bits import Bits

GREEDY_BATCH = 1 << 18  # pairs sorted at a time


@dataclass(frozen=True, eq=False)
class Linking:
    """An order of the neurons, and where its links are."""

    order: Neurons
    """int32[n], `order[slot]` = neuron."""
    links: Neurons
    """int32[links], ascending: the slots at which links start; a link ends where the next one starts."""


def link_greedy(counts: Counts, activation_counts: npt.NDArray[np.int64], *, batch: int = GREEDY_BATCH) -> Linking:
    """Link the neurons by their co-activation counts: Algorithm 1 of the paper, exactly, over all pairs.

    Pairs are taken in greedy order: by descending count, ties by ascending (i, j), i < j. A pair is linked unless
    one of the two has two neighbours already, or they are in the same path; pairs of count 0 are never linked.
    A neuron without a link is a path of one. Paths are laid out by descending mean activation count, ties by smallest
    neuron index; so neurons that never fired come last, by ascending index. Each path starts at its end with the
    larger activation count, ties at the end with the smaller index.

    Args:
        counts: [n, n]; only the upper triangle is read.
        activation_counts: int64[n]; `counts[i, j]` must not exceed that of i or j.
        batch: Pairs sorted at a time. Limits the memory; does not change the result.

    Raises:
        InputError: `counts` and `activation_counts` differ in the number of neurons.
        UnsupportedError: The square of the number of neurons, times their activations, does not fit in 63 bits.
    """
    n = activation_counts.size
    if counts.shape != (n, n):
        raise InputError(f"co-activation counts of shape {list(counts.shape)} do not fit {n} neurons")
    paths = Paths(activation_counts)
    pairs = LeadingPairs(batch, paths.activation_counts)
    while True:
        neurons = paths.open_neurons()
        pairs.offer(counts, neurons, neurons, neurons, paths)
        if not paths.join_leading(pairs):
            return paths.lay_out()


class LeadingPairs:
    """The first `capacity` of all offered pairs in greedy order, as integer keys that ascend in that order.

    Most pairs are rejected, because the neurons that fire most get their two neighbours early. So pairs are taken in
    batches, and each batch looks only at neurons that still have fewer than two neighbours.
    """

    def __init__(self, capacity: int, activation_counts: npt.NDArray[np.int64]) -> None:
        n = activation_counts.size
        largest = int(activation_counts.max(initial=0))
        if (largest + 1) * n * n >= 1 << 63:
            raise UnsupportedError(f"a block of {n} neurons that fired up to {largest} times is too large to link")
        self.n = n
        self.largest = largest
        self.capacity = max(capacity, 1)
        # Room for at least one row beyond the capacity, and enough to trim rarely.
        self.keys = np.empty(self.capacity + max(self.capacity, n), dtype=np.int64)
        self.restart(largest)

    def restart(self, ceiling: int) -> None:
        """Begin a batch of pairs with counts up to `ceiling`, inclusive."""
        self.size = 0
        self.dropped = False
        self.ceiling = ceiling
        self.floor = 1  # pairs of lower counts cannot be among the first

    def offer(self, table: Counts, rows: Neurons, columns: Neurons, neurons: Neurons, paths: Paths) -> None:
        """Offer each of the first `rows.size` of `neurons` paired with every later one, except the two ends of a path.

        The co-activation count of the a-th and the b-th neuron, a < b, is `table[rows[a], columns[b]]`.
        """
        done = 0
        while True:
            done, self.size = _collect(
                table,
                (rows, columns, neurons),
                (paths.activation_counts, paths.other_end),
                done,
                (self.floor, self.ceiling, self.largest),
                self.keys,
                self.size,
            )
            if done == rows.size:
                break
            self.trim()

    def trim(self) -> None:
        """Drop all but the first `capacity` pairs and raise the floor to the count of the last of them."""
        if self.size > self.capacity:
            self.keys[: self.size].partition(self.capacity - 1)
            self.size = self.capacity
            self.dropped = True
            self.floor = self._count(self.keys[self.size - 1])

    def take(self) -> tuple[npt.NDArray[np.int64], bool]:
        """Return the keys in greedy order and whether more pairs follow, and begin the next batch after them."""
        self.trim()
        keys, dropped = self.keys[: self.size], self.dropped
        keys.sort()
        self.restart(self._count(keys[-1]) if keys.size else 0)
        return keys, dropped

    def _count(self, key: np.int64) -> int:
        return self.largest - int(key) // (self.n * self.n)


class Paths:
    """The paths linked so far. Only ends of paths are ever joined, so each end only needs to know the other."""

    def __init__(self, activation_counts: npt.NDArray[np.int64]) -> None:
        n = activation_counts.size
        self.activation_counts = np.ascontiguousarray(activation_counts, dtype=np.int64)
        self.neighbours = np.full((n, 2), -1, dtype=np.int32)
        self.other_end = np.arange(n, dtype=np.int32)

    def open_neurons(self) -> Neurons:
        """Neurons that may still be linked, ascending: neurons that fired and have fewer than two neighbours."""
        return np.nonzero((self.neighbours[:, 1] < 0) & (self.activation_counts > 0))[0].astype(np.int32)

    def join_leading(self, pairs: LeadingPairs) -> bool:
        """Link all `pairs` that can be linked; return whether there may be more."""
        keys, more = pairs.take()
        _join(keys, pairs.n, self.neighbours, self.other_end)
        return more

    def lay_out(self) -> Linking:
        """Arrange the paths one after the other, as `link_greedy` documents."""
        n = self.other_end.size
        ends = np.nonzero(self.neighbours[:, 1] < 0)[0]
        other = self.other_end[ends]
        count, other_count = self.activation_counts[ends], self.activation_counts[other]
        starts = ends[(count > other_count) | ((count == other_count) & (ends <= other))].astype(np.int32)
        walked = np.empty(n, dtype=np.int32)
        first = np.empty(starts.size + 1, dtype=np.int64)
        _walk(starts, self.neighbours, walked, first)
        length = np.diff(first)
        if starts.size:
            # For integers this small, quotients are equal as floats only if they are exactly equal.
            mean = np.add.reduceat(self.activation_counts[walked], first[:-1]) / length
            smallest = np.minimum.reduceat(walked, first[:-1])
            arranged = np.lexsort((smallest, -mean))
        else:
            arranged = np.empty(0, dtype=np.int64)
        links = np.cumsum(length[arranged]) - length[arranged]
        slots = np.repeat(first[arranged] - links, length[arranged]) + np.arange(n)
        return Linking(order=walked[slots], links=links.astype(np.int32))


@kernel
def _collect(
    table: Counts,
    positions: tuple[Neurons, Neurons, Neurons],
    state: tuple[npt.NDArray[np.int64], Neurons],
    done: int,
    counts: tuple[int, int, int],
    keys: npt.NDArray[np.int64],
    size: int,
) -> tuple[int, int]:
    """Append the keys of rows from `done` on while a row surely fits; return the rows done and the number of keys."""
    rows, columns, neurons = positions
    activation_counts, other_end = state
    floor, ceiling, largest = counts
    n = other_end.size
    for a in range(done, rows.size):
        if size + neurons.size > keys.size:
            return a, size
        i = neurons[a]
        if activation_counts[i] < floor:
            continue
        row = table[rows[a]]
        for b in range(a + 1, neurons.size):
            count = np.int64(row[columns[b]])
            j = neurons[b]
            if floor <= count <= ceiling and other_end[i] != j:
                keys[size] = ((largest - count) * n + min(i, j)) * n + max(i, j)
                size += 1
    return rows.size, size


@kernel
def _join(keys: npt.NDArray[np.int64], n: int, neighbours: Neurons, other_end: Neurons) -> None:
    """Link the pairs in the order given, unless a neuron has two neighbours or both are ends of one path."""
    for key in keys:
        i, j = key // n % n, key % n
        if neighbours[i, 1] >= 0 or neighbours[j, 1] >= 0 or other_end[i] == j:
            continue
        neighbours[i, 1 if neighbours[i, 0] >= 0 else 0] = j
        neighbours[j, 1 if neighbours[j, 0] >= 0 else 0] = i
        start, stop = other_end[i], other_end[j]
        other_end[start] = stop
        other_end[stop] = start


@kernel
def _walk(starts: Neurons, neighbours: Neurons, walked: Neurons, first: npt.NDArray[np.int64]) -> None:
    """Write the paths from `starts` one after the other to `walked`, and where each begins to `first`."""
    slot = 0
    for k in range(starts.size):
        first[k] = slot
        previous, neuron = -1, starts[k]
        while neuron >= 0:
            walked[slot] = neuron
            slot += 1
            following = neighbours[neuron, 0]
            # Towards the end of a path the second neighbour is -1, and in a path of one so is the first.
            if following == previous:
                following = neighbours[neuron, 1]
            previous, neuron = neuron, following
    first[starts.size] = slot


BATCH = 1 << 20  # pairs sorted at a time: more than for `link_greedy`, since every batch counts again


def link_tiled(
    bits: Bits, activation_counts: npt.NDArray[np.int64], *, batch: int = BATCH, workers: int | None = None
) -> Linking:
    """Link the neurons exactly as `link_greedy` does, counting stripe by stripe instead of all at once.

    Every batch counts its pairs again, among the neurons that still have fewer than two neighbours. A pair cannot fire
    together more often than either neuron fires. So neurons are taken from the most active to the least, and neurons
    that fired less often than the pairs already found are not counted at all.

    Args:
        bits: uint64[n, words], neuron-major.
        activation_counts: int64[n], of `bits`.
        batch: Pairs sorted at a time. Limits the memory; does not change the result.
        workers: Number of threads; by default as many as the process may use. Does not change the result.

    Raises:
        InputError: `bits` and `activation_counts` differ in the number of neurons.
        UnsupportedError: As `link_greedy`.
    """
    if bits.shape[0] != activation_counts.size:
        raise InputError(f"{activation_counts.size} activation counts do not fit {bits.shape[0]} bit vectors")
    paths = Paths(activation_counts)
    pairs = LeadingPairs(batch, paths.activation_counts)
    workers = workers or available_cpus()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            neurons = paths.open_neurons()
            neurons = neurons[np.argsort(-paths.activation_counts[neurons], kind="stable")]
            _offer_counted(bits, neurons, pairs, paths, pool, workers)
            if not paths.join_leading(pairs):
                return paths.lay_out()


def _offer_counted(
    bits: Bits,
    neurons: npt.NDArray[np.int32],
    pairs: LeadingPairs,
    paths: Paths,
    pool: ThreadPoolExecutor,
    workers: int,
) -> None:
    """Offer all pairs of `neurons`, which come in descending order of activation, to `pairs`."""
    activations = paths.activation_counts[neurons]
    selected = bits[neurons]
    dtype = count_dtype(activations)

    def count_stripe(bounds: tuple[int, int, int]) -> Counts:
        first, last, end = bounds
        stripe: Counts = np.zeros((last - first, end - first), dtype=dtype)
        count_together(selected, first, last, end, stripe)
        return stripe

    first, end = 0, neurons.size
    while first < end:
        starts = range(first, min(first + workers * STRIPE, end), STRIPE)
        tasks = [(start, min(start + STRIPE, end), end) for start in starts]
        for start, stripe in zip(starts, pool.map(count_stripe, tasks), strict=True):
            rows, columns = (np.arange(size, dtype=np.int32) for size in stripe.shape)
            pairs.offer(stripe, rows, columns, neurons[start:end], paths)
        first = tasks[-1][1]
        end = int(np.searchsorted(-activations, -pairs.floor, side="right"))
