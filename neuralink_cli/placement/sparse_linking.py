"""Linking without the full matrix of co-activation counts: the counts are computed where and when they are needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from neuralink_cli.errors import InputError
from neuralink_cli.placement.bits import Bits
from neuralink_cli.placement.counting import STRIPE, Counts, available_cpus, count_dtype, count_together
from neuralink_cli.placement.linking import LeadingPairs, Linking, Paths

BATCH = 1 << 20  # pairs sorted at a time: more than if counts are at hand, since every batch counts anew


def link_tiled(
    bits: Bits, activation_counts: npt.NDArray[np.int64], *, batch: int = BATCH, workers: int | None = None
) -> Linking:
    """Link the neurons exactly as `link_greedy` does, counting stripe by stripe instead of all at once.

    Every batch of pairs is counted anew, among the neurons that still have less than two neighbours. A pair cannot
    fire together more often than either neuron fires, so going from the most active neuron to the least, all those
    that fired less often than the pairs already found need not be counted at all.

    Args:
        bits: uint64[n, words], neuron-major.
        activation_counts: int64[n], of `bits`.
        batch: Pairs sorted at a time: bounds the memory needed, and does not change the result.
        workers: Number of threads; all the process may use by default. The result does not depend on it.

    Raises:
        InputError: `bits` and `activation_counts` differ in the number of neurons.
        UnsupportedError: As `link_greedy`.
    """
    if bits.shape[0] != activation_counts.size:
        raise InputError(f"{activation_counts.size} activation counts are not those of {bits.shape[0]} bit vectors")
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
