"""Whether the blocks of a model compute what its layout says: they are compared while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import FFNBlock, moved_regions
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import MismatchError
from neuralink_cli.layout.open_layout import Layout, open_layout
from neuralink_cli.profiling.description_check import DescriptionCheck


class LayoutDescription:
    """What a layout says of the blocks of its model: where their weights lie, and their activation.

    Attributes:
        compared: Ids of the blocks that were computed again while models ran within `watching`.

    Raises:
        MismatchError: The architecture describes other blocks, or has their weights elsewhere.
        InputError, UnsupportedError: The checkpoint or the layout cannot be used.
    """

    def __init__(self, directory: Path, source: Path, architecture: Architecture) -> None:
        self.compared: tuple[str, ...] = ()
        self._layout = directory
        self._source = source
        self._architecture = architecture
        with Checkpoint(source) as checkpoint, open_layout(directory) as layout:
            self._blocks = _as_stated(layout, checkpoint, architecture)
            self._shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Compare blocks of the source's model as it runs, once of each kind in the first and in the last layer.

        Raises:
            UnsupportedError: One computes something else than the layout says.
        """
        check = DescriptionCheck(
            model, self._source, self._blocks, self._shapes, self._architecture, f"the layout {self._layout}"
        )
        with check:
            yield
        self.compared = check.compared


def _as_stated(layout: Layout, checkpoint: Checkpoint, architecture: Architecture) -> tuple[FFNBlock, ...]:
    """The blocks of a checkpoint, with the activations that a layout states."""
    found = {block.id: block for block in find_blocks(checkpoint, architecture)}
    if layout.kind == "bundled":
        bundled = {block.id: block for block in layout.index.blocks}
        described = {id: {(part.role, block.region(part)) for part in block.parts} for id, block in found.items()}
        _require_same(
            layout,
            {id: {(part.role, block.source_region(part)) for part in block.matrices} for id, block in bundled.items()},
            described,
        )
        return tuple(
            replace(found[id], activation=block.activation, up_values=block.up_values) for id, block in bundled.items()
        )
    permuted = {block["id"]: block for block in layout.index["blocks"]}
    stated = {id: {Region(**region) for region in block["regions"]} for id, block in permuted.items()}
    _require_same(layout, stated, {id: set(moved_regions(checkpoint, block)) for id, block in found.items()})
    return tuple(replace(found[id], activation=block["activation"]) for id, block in permuted.items())


def _require_same(layout: Layout, stated: Mapping[str, Set[object]], described: Mapping[str, Set[object]]) -> None:
    differing = next((id for id in [*stated, *described] if stated.get(id) != described.get(id)), None)
    if differing is not None:
        raise MismatchError(
            f"has the weights of block {differing!r} elsewhere than the model's architecture says",
            where=layout.directory,
            fix="pass the --architecture that it was made with, or make it again",
        )
