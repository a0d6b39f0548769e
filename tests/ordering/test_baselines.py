import io
from collections.abc import Callable
from itertools import pairwise

import networkx as nx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.ordering.baselines import (
    frequency_order,
    original_order,
    reverse_cuthill_mckee_order,
    spectral_order,
    strongest_graph,
)
from neuralink_cli.ordering.partners import Links

GRAPH_ORDERS = [reverse_cuthill_mckee_order, spectral_order]


def links(*edges: tuple[int, int, int]) -> Links:
    i, j, count = np.array(sorted(edges), dtype=np.int64).reshape(-1, 3).T
    return i.astype(np.int32), j.astype(np.int32), count.astype(np.uint32)


@given(st.lists(st.integers(0, 5)))
def test_simple_orders(activations: list[int]) -> None:
    n = len(activations)
    assert original_order(n).tolist() == list(range(n))
    expected = sorted(range(n), key=lambda i: (-activations[i], i))
    order = frequency_order(np.array(activations, dtype=np.int64))
    assert order.dtype == np.int32
    assert order.tolist() == expected


@pytest.mark.parametrize("arrange", GRAPH_ORDERS)
def test_graph_orders_find_a_shuffled_path(arrange: Callable[..., npt.NDArray[np.int32]]) -> None:
    path = np.random.default_rng(0).permutation(100)
    edges = [(min(a, b), max(a, b), 3) for a, b in pairwise(path)]
    order = arrange(*links(*edges), np.full(100, 5))
    assert order.tolist() in (path.tolist(), path[::-1].tolist())


@pytest.mark.parametrize("seed", range(8))
def test_spectral_order_starts_at_the_more_active_end_or_the_one_of_smaller_index(seed: int) -> None:
    path = np.random.default_rng(seed).permutation(21)
    edges = links(*((min(a, b), max(a, b), 3) for a, b in pairwise(path)))
    even = np.full(21, 5)
    order = spectral_order(*edges, even)
    assert order[0] < order[-1]
    # The neuron in the middle is of neither half.
    assert spectral_order(*edges, np.where(np.arange(21) == path[10], 90, even)).tolist() == order.tolist()
    for hot in (path[0], path[9], path[11], path[20]):
        half = order.tolist().index(hot) < 10
        expected = order if half else order[::-1]
        assert spectral_order(*edges, np.where(np.arange(21) == hot, 6, even)).tolist() == expected.tolist()


@pytest.mark.parametrize("arrange", GRAPH_ORDERS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_graph_orders_are_permutations_hot_components_first(
    arrange: Callable[..., npt.NDArray[np.int32]], data: st.DataObject
) -> None:
    n = data.draw(st.integers(0, 30))
    pairs = data.draw(st.sets(st.tuples(st.integers(0, n), st.integers(0, n)).filter(lambda p: p[0] < p[1] < n)))
    edges = links(*((a, b, data.draw(st.integers(1, 9))) for a, b in sorted(pairs)))
    activations = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), dtype=np.int64)
    order = arrange(*edges, activations)
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, arrange(*edges, activations))
    graph = strongest_graph(*edges, activations)
    components = sorted(map(sorted, nx.connected_components(graph)), key=lambda c: (-activations[c].mean(), c[0]))
    slot = 0
    for component in components:
        assert sorted(order[slot : slot + len(component)].tolist()) == component
        slot += len(component)


def test_spectral_order_separates_clusters_and_starts_with_the_hot_one() -> None:
    rng = np.random.default_rng(2)
    cluster = rng.permutation(np.repeat([0, 1], 150))
    edges = [(a, b, 20 if cluster[a] == cluster[b] else 1) for a in range(300) for b in range(a) if rng.random() < 0.1]
    order = spectral_order(*links(*((b, a, count) for a, b, count in edges)), np.where(cluster == 1, 50, 10))
    assert cluster[order].tolist() == [1] * 150 + [0] * 150


def test_spectral_order_agrees_with_dense_linear_algebra() -> None:
    rng = np.random.default_rng(5)
    place = rng.random(400)
    i, j = np.nonzero(np.triu(np.abs(place[:, None] - place) < 0.05, 1))
    count = rng.integers(5, 20, i.size)
    weight = np.zeros((400, 400))
    weight[i, j] = weight[j, i] = count
    degree = weight.sum(axis=1)
    _, vectors = np.linalg.eigh(weight / np.sqrt(np.outer(degree, degree)))
    expected: npt.NDArray[np.int64] = np.argsort(vectors[:, -2] / np.sqrt(degree))
    order = spectral_order(i.astype(np.int32), j.astype(np.int32), count.astype(np.uint32), np.ones(400, np.int64))
    assert order.tolist() in (expected.tolist(), expected[::-1].tolist())


def test_graph_can_be_written_as_graphml() -> None:
    graph = strongest_graph(*links((0, 2, 7)), np.array([3, 0, 9]))
    assert graph.nodes(data=True)[2] == {"frequency": 9}
    written = io.BytesIO()
    nx.write_graphml(graph, written)
    written.seek(0)
    back = nx.read_graphml(written, node_type=int)
    assert dict(back.edges) == {(0, 2): {"count": 7}}
    assert dict(back.nodes(data="frequency")) == {0: 3, 1: 0, 2: 9}
