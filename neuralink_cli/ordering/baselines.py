"""Orders to compare linking with: original, by frequency, and two classical orders of the co-activation graph."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Neurons

Activations = npt.NDArray[np.int64]

LANCZOS_STEPS = 200


def original_order(n: int) -> Neurons:
    """The order of the checkpoint: int32[n]."""
    return np.arange(n, dtype=np.int32)


def frequency_order(activation_counts: Activations) -> Neurons:
    """Neurons by descending activation count, ties by index (the paper's Neuralink-S): int32[n]."""
    return np.argsort(-activation_counts, kind="stable").astype(np.int32)


def strongest_graph(
    i: Neurons, j: Neurons, count: npt.NDArray[np.uint32], activation_counts: npt.NDArray[np.int64 | np.floating]
) -> nx.Graph:
    """The sparse co-activation graph of a block, as found by `partners.strongest_links`.

    Args:
        i: int32[edges], one neuron of each pair.
        j: int32[edges], the other.
        count: Their co-activation counts, the edge attribute `count`.
        activation_counts: [n], the node attribute `frequency`: activation counts, or their shares of the tokens.

    Returns:
        A graph of nodes 0 to n - 1 with plain Python attributes, as GraphML needs them.
    """
    graph = nx.Graph()
    graph.add_nodes_from((k, {"frequency": frequency}) for k, frequency in enumerate(activation_counts.tolist()))
    edges = zip(i.tolist(), j.tolist(), count.tolist(), strict=True)
    graph.add_edges_from((a, b, {"count": strength}) for a, b, strength in edges)
    return graph


def reverse_cuthill_mckee_order(
    i: Neurons, j: Neurons, count: npt.NDArray[np.uint32], activation_counts: Activations
) -> Neurons:
    """Order neurons by reverse Cuthill-McKee, which keeps linked neurons within a narrow band: int32[n].

    Args:
        i: int32[edges], one neuron of each pair of the sparse co-activation graph.
        j: int32[edges], the other.
        count: Their co-activation counts, whose size does not matter here.
        activation_counts: int64[n]. Connected components come in descending order of their mean, ties by smallest
            index, so that neurons that never fired are last.
    """
    graph = strongest_graph(i, j, count, activation_counts)

    def arrange(neurons: Neurons) -> Neurons:
        component = graph.subgraph(neurons.tolist()).copy()
        return np.array(list(nx.utils.reverse_cuthill_mckee_ordering(component)), dtype=np.int32)

    return _order_components(graph, activation_counts, arrange)


def spectral_order(i: Neurons, j: Neurons, count: npt.NDArray[np.uint32], activation_counts: Activations) -> Neurons:
    """Order neurons by their entry in the Fiedler vector of the sparse co-activation graph: int32[n].

    The vector is that of the normalised Laplacian with the counts as weights, approximated by a fixed number of Lanczos
    steps from a fixed vector. Each component starts with its more active end. Results repeat on one machine;
    another machine's linear algebra may round differently and order near-equal entries differently.

    Args:
        i: int32[edges], one neuron of each pair of the sparse co-activation graph.
        j: int32[edges], the other.
        count: Their co-activation counts.
        activation_counts: int64[n]. Connected components come in descending order of their mean, ties by smallest
            index, so that neurons that never fired are last.
    """
    n = activation_counts.size

    def arrange(neurons: Neurons) -> Neurons:
        inside = np.zeros(n, dtype=bool)
        inside[neurons] = True
        edges = inside[i]
        position = np.cumsum(inside) - 1
        vector = _fiedler_vector(neurons.size, position[i[edges]], position[j[edges]], count[edges].astype(np.float64))
        order = neurons[np.argsort(vector, kind="stable")]
        half = neurons.size // 2
        front, back = activation_counts[order[:half]].sum(), activation_counts[order[-half:]].sum()
        return order if (front, -order[0]) >= (back, -order[-1]) else order[::-1]

    return _order_components(strongest_graph(i, j, count, activation_counts), activation_counts, arrange)


def _order_components(
    graph: nx.Graph, activation_counts: Activations, arrange: Callable[[Neurons], Neurons]
) -> Neurons:
    """Order the connected components by descending mean activation, and the neurons of each by `arrange`."""
    components = [np.array(sorted(component), dtype=np.int32) for component in nx.connected_components(graph)]
    components.sort(key=lambda neurons: (-float(activation_counts[neurons].mean()), int(neurons[0])))
    ordered = [neurons if neurons.size < 2 else arrange(neurons) for neurons in components]
    return np.concatenate([np.empty(0, dtype=np.int32), *ordered])


def _fiedler_vector(
    n: int, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64], weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The Fiedler vector of a connected graph of n >= 2 nodes: float64[n], of either sign."""
    degree = np.bincount(i, weight, n) + np.bincount(j, weight, n)
    scale = 1 / np.sqrt(degree)
    scaled = weight * scale[i] * scale[j]
    # The largest eigenvalue of the scaled weights is 1, with vector sqrt(degree); the next gives the Fiedler vector.
    steps = min(LANCZOS_STEPS, n - 1)
    basis = np.zeros((steps + 1, n))
    basis[0] = np.sqrt(degree / degree.sum())
    tridiagonal = np.zeros((steps, steps))
    following: npt.NDArray[np.float64] = np.random.default_rng(0).standard_normal(n)
    norm = 0.0
    for step in range(steps):
        # Orthogonalise twice against all vectors so far: Lanczos vectors otherwise drift by rounding.
        for _ in range(2):
            following -= basis[: step + 1].T @ (basis[: step + 1] @ following)
        norm = float(np.linalg.norm(following))
        if step and norm < 1e-10:
            steps = step  # the vectors so far span an invariant subspace
            break
        if step:
            tridiagonal[step, step - 1] = tridiagonal[step - 1, step] = norm
        vector = basis[step + 1] = following / norm
        following = np.asarray(
            np.bincount(i, scaled * vector[j], n) + np.bincount(j, scaled * vector[i], n), np.float64
        )
        tridiagonal[step, step] = vector @ following
    _, ritz = np.linalg.eigh(tridiagonal[:steps, :steps])
    fiedler: npt.NDArray[np.float64] = (ritz[:, -1] @ basis[1 : steps + 1]) * scale
    return fiedler
