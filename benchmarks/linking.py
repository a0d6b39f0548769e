"""Greedy linking against the paper's priority queue and against sorting all pairs, in one process.

python benchmarks/linking.py --neurons 11008 --tokens 32768 --reference-neurons 2048
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
from counting import clustered_activations, measure, print_header, print_row

from neuralink_cli.ordering.baselines import frequency_order, original_order
from neuralink_cli.ordering.counting import coactivation_counts
from neuralink_cli.ordering.linking import link_greedy, link_tiled
from neuralink_cli.placement.bits import activation_counts, transpose_bits
from neuralink_cli.placement.held_out import read_statistics

Bits = npt.NDArray[np.uint64]
Edges = set[tuple[int, int]]


def join(pairs: Iterable[tuple[int, int]], n: int) -> Edges:
    """Algorithm 1 from the second step on: take `pairs` in order, with degrees and a union-find."""
    degree = [0] * n
    parent = list(range(n))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = set()
    for i, j in pairs:
        if degree[i] < 2 and degree[j] < 2 and find(i) != find(j):
            parent[find(i)] = find(j)
            degree[i] += 1
            degree[j] += 1
            edges.add((i, j))
    return edges


def link_by_heap(counts: npt.NDArray[np.unsignedinteger]) -> Edges:
    """Algorithm 1 as printed: all pairs in a priority queue."""
    n = len(counts)
    rows = (counts[i].tolist() for i in range(n))
    queue = [(-row[j], i, j) for i, row in enumerate(rows) for j in range(i + 1, n) if row[j]]
    heapq.heapify(queue)
    return join((heapq.heappop(queue)[1:] for _ in range(len(queue))), n)


def sorted_pairs(counts: npt.NDArray[np.unsignedinteger]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All pairs that fired together, by one stable sort."""
    i, j = np.nonzero(np.triu(counts, 1))
    ranks = np.argsort(-counts[i, j].astype(np.int32), kind="stable")
    return i[ranks], j[ranks]


def link_by_sort(counts: npt.NDArray[np.unsignedinteger]) -> Edges:
    """Algorithm 1 with a sort in place of the queue."""
    i, j = sorted_pairs(counts)
    return join(zip(i.tolist(), j.tolist(), strict=True), len(counts))


def edges_of(order: npt.NDArray[np.int32], links: npt.NDArray[np.int32]) -> Edges:
    """The pairs that a linking joined."""
    joined = np.ones(len(order), dtype=bool)
    joined[links] = False
    slots = np.nonzero(joined)[0]
    low, high = np.minimum(order[slots - 1], order[slots]), np.maximum(order[slots - 1], order[slots])
    return set(zip(low.tolist(), high.tolist(), strict=True))


def compare(bits: Bits, tokens: int, repeat: int, in_python: bool) -> None:
    """Print the table of one block; with `in_python` including the plain Python ways, which must agree."""
    n = len(bits)
    activations = activation_counts(bits)
    print(f"\n{n} neurons, {tokens} tokens, {100 * activations.sum() / max(n * tokens, 1):.1f} % active\n")
    print_header("x slower", "read length")

    def length(order: npt.NDArray[np.int32]) -> str:
        return f"{read_statistics(bits, order, tokens).mean_read_length:.3f}"

    counted = measure(lambda: coactivation_counts(bits), repeat)
    counts = counted.result
    print_row("coactivation_counts, for link_greedy", counted)
    greedy = measure(lambda: link_greedy(counts, activations), repeat)
    linking = greedy.result
    print_row("link_greedy", greedy, "1.0", length(linking.order))

    if in_python:
        edges = edges_of(linking.order, linking.links)
        for name, link in (("numpy argsort, union-find in Python", link_by_sort), ("heapq, as printed", link_by_heap)):
            measured = measure(partial(link, counts))
            assert measured.result == edges
            print_row(name, measured, f"{measured.seconds / greedy.seconds:.1f}")
    else:
        measured = measure(lambda: sorted_pairs(counts))
        print_row("numpy argsort of all pairs, no linking", measured, f"{measured.seconds / greedy.seconds:.1f}")
        measured.result = None
    tiled = measure(lambda: link_tiled(bits, activations), repeat)
    assert np.array_equal(tiled.result.order, linking.order)
    print_row("link_tiled, counting included", tiled, "", length(tiled.result.order))
    print(f"{'original order':83}{length(original_order(n)):>12}")
    print(f"{'frequency order':83}{length(frequency_order(activations)):>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--reference-neurons", type=int, default=2048, help="neurons for the plain Python ways")
    parser.add_argument("--active", type=float, default=0.07, help="share of neurons that fire")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each of ours, of which the fastest counts")
    options = parser.parse_args()

    warm = transpose_bits(np.ones((64, 1), dtype=np.uint8), 8)
    link_greedy(coactivation_counts(warm), activation_counts(warm))
    for neurons, in_python in ((options.reference_neurons, True), (options.neurons, False)):
        fired = clustered_activations(neurons, options.tokens, options.active, options.seed)
        compare(transpose_bits(fired, neurons), options.tokens, options.repeat, in_python)


if __name__ == "__main__":
    main()
