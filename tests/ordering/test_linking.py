import heapq
from collections.abc import Callable
from fractions import Fraction

import networkx as nx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.ordering.counting import coactivation_counts
from neuralink_cli.ordering.linking import LeadingPairs, Linking, Paths, link_greedy, link_tiled
from neuralink_cli.placement.bits import activation_counts, transpose_bits

Pairs = dict[tuple[int, int], int]


def reference(pairs: Pairs, activations: list[int]) -> tuple[list[int], list[int]]:
    """Algorithm 1 with a priority queue, then the documented layout: order and starts of links."""
    graph = nx.empty_graph(len(activations))
    queue = [(-count, i, j) for (i, j), count in pairs.items() if count > 0]
    heapq.heapify(queue)
    while queue:
        _, i, j = heapq.heappop(queue)
        if graph.degree[i] < 2 and graph.degree[j] < 2 and not nx.has_path(graph, i, j):
            graph.add_edge(i, j)
    paths = []
    for component in nx.connected_components(graph):
        start = min((i for i in component if graph.degree[i] < 2), key=lambda i: (-activations[i], i))
        path = list(nx.dfs_preorder_nodes(graph, start))
        mean = Fraction(sum(activations[i] for i in path), len(path))
        paths.append((-mean, min(path), path))
    order: list[int] = []
    links = []
    for _, _, path in sorted(paths):
        links.append(len(order))
        order += path
    return order, links


def as_lists(linking: Linking) -> tuple[list[int], list[int]]:
    assert linking.order.dtype == linking.links.dtype == np.int32
    return linking.order.tolist(), linking.links.tolist()


@st.composite
def fired_tokens(draw: st.DrawFn) -> npt.NDArray[np.bool_]:
    """Few tokens give many ties; some neurons never fire, some always."""
    shape = draw(st.tuples(st.integers(0, 30), st.integers(0, 24)))
    fired = draw(arrays(np.bool_, shape))
    kind = draw(arrays(np.int8, shape[1], elements=st.integers(0, 4)))
    return np.asarray((fired | (kind == 4)) & (kind != 0))


def pack(fired: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    tokens, n = fired.shape
    return transpose_bits(np.packbits(fired, axis=1, bitorder="little").reshape(tokens, -(-n // 8)), n)


def all_pairs(fired: npt.NDArray[np.bool_]) -> Pairs:
    counts = fired.T.astype(np.int64) @ fired.astype(np.int64)
    return {(i, j): int(counts[i, j]) for j in range(len(counts)) for i in range(j)}


@given(fired_tokens(), st.integers(1, 40))
@example(np.zeros((0, 0), bool), 1)
@example(np.ones((5, 1), bool), 1)
@example(np.ones((5, 2), bool), 1)
@example(np.zeros((5, 2), bool), 1)
@example(np.ones((3, 24), bool), 1)
@settings(deadline=None, max_examples=300)
def test_links_as_the_priority_queue_does(fired: npt.NDArray[np.bool_], batch: int) -> None:
    bits = pack(fired)
    activations = activation_counts(bits)
    expected = reference(all_pairs(fired), activations.tolist())
    counts = coactivation_counts(bits)
    assert as_lists(link_greedy(counts, activations)) == expected
    assert as_lists(link_greedy(counts, activations, batch=batch)) == expected
    assert as_lists(link_tiled(bits, activations)) == expected
    assert as_lists(link_tiled(bits, activations, batch=batch)) == expected


@pytest.mark.parametrize("link", [link_greedy, link_tiled])
def test_larger_blocks_take_several_stripes_and_batches(link: Callable[..., Linking]) -> None:
    rng = np.random.default_rng(3)
    fired = rng.random((100, 700)) < np.minimum(rng.lognormal(-2.5, 1.5, 700), 1)
    fired[:, 100:130] = True
    bits = pack(fired)
    activations = activation_counts(bits)
    table = coactivation_counts(bits) if link is link_greedy else bits
    linking = as_lists(link(table, activations, batch=5000))
    assert linking == as_lists(link(table, activations))
    assert linking == reference(all_pairs(fired), activations.tolist())


def test_tiled_linking_does_not_depend_on_the_number_of_workers() -> None:
    bits = pack(np.random.default_rng(4).random((90, 600)) < 0.1)
    activations = activation_counts(bits)
    linkings = [as_lists(link_tiled(bits, activations, batch=3000, workers=workers)) for workers in (1, 2, 7)]
    assert linkings[0] == linkings[1] == linkings[2]


@given(fired_tokens(), st.integers(1, 60))
@settings(deadline=None)
def test_leading_pairs_are_the_first_in_greedy_order_batch_by_batch(fired: npt.NDArray[np.bool_], batch: int) -> None:
    bits = pack(fired)
    activations = activation_counts(bits)
    n = len(bits)
    greedy = sorted((-count, i, j) for (i, j), count in all_pairs(fired).items() if count > 0)
    pairs, paths = LeadingPairs(batch, activations), Paths(activations)
    neurons = np.arange(n, dtype=np.int32)
    more = True
    ceiling = int(activations.max(initial=0))
    while more:
        assert pairs.ceiling == ceiling
        pairs.offer(coactivation_counts(bits), neurons, neurons, neurons, paths)
        offered = [pair for pair in greedy if -pair[0] <= ceiling]
        pairs.trim()
        # Once pairs were dropped, those below the last that is kept need not be looked at.
        assert pairs.floor == (-offered[batch - 1][0] if pairs.dropped else 1)
        keys, more = pairs.take()
        assert more == (len(offered) > batch)
        first = offered[:batch]
        assert keys.tolist() == [((activations.max() + count) * n + i) * n + j for count, i, j in first]
        ceiling = -first[-1][0] if first else 0
        if more and ceiling == -offered[0][0]:
            break  # a batch of one count is offered again until its pairs are linked


def test_layout_puts_hot_paths_first_and_starts_at_the_hotter_end() -> None:
    # 4-1-5 fire on the same tokens as each other, 4 least of the ends; 0 alone; 2 and 3 never.
    counts = np.zeros((6, 6), dtype=np.uint16)
    counts[1, 4], counts[1, 5] = 3, 4
    linking = link_greedy(counts, np.array([6, 5, 0, 0, 3, 4]))
    assert as_lists(linking) == ([0, 5, 1, 4, 2, 3], [0, 1, 4, 5])


def test_refuses_blocks_whose_pairs_do_not_fit_a_key() -> None:
    with pytest.raises(UnsupportedError, match="too large to link"):
        link_greedy(np.zeros((2, 2), np.uint16), np.array([1, 1 << 62]))


def test_refuses_inputs_that_do_not_belong_together() -> None:
    activations = np.array([1, 2, 3])
    with pytest.raises(InputError, match="do not fit 3 neurons"):
        link_greedy(np.zeros((4, 4), np.uint16), activations)
    with pytest.raises(InputError, match="do not fit 4 bit vectors"):
        link_tiled(np.zeros((4, 1), np.uint64), activations)
