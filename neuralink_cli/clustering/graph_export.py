"""The co-activation graph as GraphML, to look at; the ordering does not use it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.errors import MismatchError
from neuralink_cli.files.durable import new_directory, require_replaceable, write_file
from neuralink_cli.ordering.block_ordering import block_bits
from neuralink_cli.ordering.partners import strongest_links
from neuralink_cli.placement.bits import activation_counts
from neuralink_cli.placement.placement import Placement, inverse

LINKS_PER_NEURON = 8


def export_graphs(trace_path: Path, placement_path: Path, directory: Path, *, overwrite: bool = False) -> None:
    """Write `<block id>.graphml` for every block: its neurons with their slots, and the strongest links of each.

    Node attributes are `slot` and `frequency` (share of all tokens); the edge attribute `count` is the number of tokens
    for which both fire.

    Raises:
        InputError: Trace or placement is malformed.
        OutputError: The directory exists, or `overwrite` would delete something else.
    """
    with (
        Trace(trace_path) as trace,
        Placement(placement_path) as placement,
        new_directory(directory, overwrite=overwrite, replaceable=is_export) as folder,
    ):
        if trace.content_sha256 != placement.info.trace["content_sha256"]:
            raise MismatchError(f"is not of the trace {trace_path}", where=placement_path)
        for block in trace.info.blocks:
            _export(trace, block, placement, folder / f"{block.id}.graphml")


def check_export(directory: Path, overwrite: bool) -> None:
    """Check, before any work is done, that the graphs may be written to `directory`.

    Raises:
        OutputError: As `export_graphs`.
    """
    require_replaceable(directory, overwrite, is_export)


def is_export(directory: Path) -> bool:
    """Whether a directory holds nothing but graphs, so that a new export may replace it."""
    return all(child.suffix == ".graphml" for child in directory.iterdir())


def _export(trace: Trace, block: TraceBlock, placement: Placement, path: Path) -> None:
    # networkx is slow to import, and the other stages do not need it.
    import networkx

    from neuralink_cli.ordering.baselines import strongest_graph

    bits = block_bits(trace, block, [(0, trace.info.tokens)])
    frequency = activation_counts(bits) / trace.info.tokens
    graph = strongest_graph(*strongest_links(bits, LINKS_PER_NEURON), frequency)
    slots = inverse(placement.blocks[block.id].order)
    networkx.set_node_attributes(graph, dict(enumerate(slots.astype(np.int64).tolist())), "slot")
    text = io.BytesIO()
    networkx.write_graphml(graph, text)
    write_file(path, text.getbuffer())
