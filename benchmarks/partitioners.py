"""General partitioners of graphs and hypergraphs as orders, beside ours: cost relative to the original order.

pip install --target /tmp/partitioners igraph leidenalg mtkahypar
PYTHONPATH=/tmp/partitioners python benchmarks/partitioners.py model.trace.safetensors

Louvain and Leiden (igraph, leidenalg) maximise the modularity of the graph of the strongest co-activations. The
hypergraph partitioner (mtkahypar) has a hyperedge for every token, and as its objective the parts that a token touches,
less one. All three say which neurons belong together, not in which sequence: parts are stored by descending mean
frequency, and the neurons of a part are linked as the published method links those of a block.

None of the packages is a dependency of neuralink; those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from order_quality import read_layers

from neuralink_cli.devices.cost import order_cost
from neuralink_cli.ordering.orders import OrderingTask, make_orders
from neuralink_cli.ordering.partners import strongest_links
from neuralink_cli.placement.bits import Bits, activation_counts

Order = npt.NDArray[np.int32]
# Links of a neuron in the graph, tokens that are hyperedges, neurons of a part.
PER_NEURON, HYPEREDGES, PART = 32, 4096, 16


def graph_of(bits: Bits) -> Any:
    """The strongest co-activations, as a weighted graph of igraph."""
    first, second, counts = strongest_links(bits, PER_NEURON)
    igraph: Any = importlib.import_module("igraph")
    edges = np.stack([first, second], axis=1).tolist()
    return igraph.Graph(n=bits.shape[0], edges=edges, edge_attrs={"weight": counts.tolist()})


def louvain(bits: Bits) -> list[int]:
    graph = graph_of(bits)
    return list(graph.community_multilevel(weights="weight").membership)


def leiden(bits: Bits) -> list[int]:
    leidenalg: Any = importlib.import_module("leidenalg")
    kind = leidenalg.ModularityVertexPartition
    return list(leidenalg.find_partition(graph_of(bits), kind, weights="weight", seed=1).membership)


@functools.cache
def initialised(mtkahypar: Any) -> Any:
    """The partitioner, which can be started once in a process."""
    tool = mtkahypar.initialize(2)
    mtkahypar.set_seed(1)
    return tool


def hypergraph(bits: Bits) -> list[int]:
    mtkahypar: Any = importlib.import_module("mtkahypar")
    rows = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").astype(bool)
    step = max(rows.shape[1] // HYPEREDGES, 1)
    edges = [np.flatnonzero(rows[:, token]).tolist() for token in range(0, rows.shape[1], step)]
    edges = [edge for edge in edges if len(edge) > 1]
    tool = initialised(mtkahypar)
    context = tool.context_from_preset(mtkahypar.PresetType.DEFAULT)
    context.set_partitioning_parameters(max(bits.shape[0] // PART, 2), 0.1, mtkahypar.Objective.KM1)
    context.logging = False
    made = tool.create_hypergraph(context, bits.shape[0], len(edges), edges)
    done = made.partition(context)
    return [done.block_id(neuron) for neuron in range(bits.shape[0])]


def stored(bits: Bits, parts: list[int]) -> Order:
    """The order that a partition makes: hot parts first, neurons linked within each."""
    counts, membership = activation_counts(bits), np.array(parts)
    names = np.unique(membership)
    means = [counts[membership == name].mean() for name in names]
    found = []
    for name in names[np.argsort(np.negative(means), kind="stable")]:
        inside = np.flatnonzero(membership == name).astype(np.int32)
        if inside.size > 2:
            linked = make_orders(OrderingTask(np.ascontiguousarray(bits[inside]), 1.0, "fast"), ["linked"])["linked"]
            inside = inside[linked.order]
        found.append(inside)
    return np.concatenate(found).astype(np.int32)


PARTITIONERS: Mapping[str, Callable[[Bits], list[int]]] = {
    "louvain": louvain,
    "leiden": leiden,
    "hypergraph": hypergraph,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--ratio", type=int, nargs="+", default=[1, 8, 32], help="cost of an operation in bundles, G")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--held-out", type=float, default=0.2)
    options = parser.parse_args()
    layers = read_layers(options.trace, options.held_out)
    print("cost over that of the original order on held-out tokens, mean over blocks; lower is better")
    print(f"{'order':12} {'parts':>6} {'seconds':>8} " + " ".join(f"{f'G = {ratio}':>8}" for ratio in options.ratio))
    for name, partition in PARTITIONERS.items():
        try:
            start = time.perf_counter()
            parts = [partition(layer.ordering) for layer in layers]
            orders = [stored(layer.ordering, found) for layer, found in zip(layers, parts, strict=True)]
        except ImportError as error:
            print(f"{name:12} left out: {error}")
            continue
        count = np.mean([len(set(found)) for found in parts])
        report(name, f"{count:.0f}", time.perf_counter() - start, layers, [orders] * len(options.ratio), options.ratio)
    for name in ("frequency", "linked", "refined"):
        start = time.perf_counter()
        made = [
            [make_orders(OrderingTask(layer.ordering, ratio, options.effort), [name])[name].order for layer in layers]
            for ratio in options.ratio
        ]
        report(name, "-", (time.perf_counter() - start) / len(made), layers, made, options.ratio)


def report(
    name: str, parts: str, seconds: float, layers: list[Any], made: list[list[Order]], ratios: list[int]
) -> None:
    """Print one row; `made` has the orders of all blocks for each ratio."""
    cells = []
    for ratio, orders in zip(ratios, made, strict=True):
        shares = []
        for layer, order in zip(layers, orders, strict=True):
            original = np.arange(order.size, dtype=np.int32)
            shares.append(order_cost(layer.held_out, order, ratio) / order_cost(layer.held_out, original, ratio))
        cells.append(float(np.mean(shares)))
    print(f"{name:12} {parts:>6} {seconds:8.1f} " + " ".join(f"{cell:8.3f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
