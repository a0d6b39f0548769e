"""How large a planned layout will be on disk, to the byte, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neuralink_cli.architectures.blocks import FFNBlock, moved_pieces
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.layout.companions import kept_files, model_card, names_of_originals, stored_name
from neuralink_cli.layout.index import (
    flash_document,
    flash_index_bytes,
    index_text,
    permuted_document,
    permuted_index_bytes,
)
from neuralink_cli.layout.plan import BundledPlan, RelayoutPlan
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, Placement

# Any SHA-256 is as long as any other.
_DIGEST = 64 * "0"


@dataclass(frozen=True)
class PlannedSize:
    """Bytes of a layout.

    Attributes:
        weights: Of the weight files.
        companions: Of the files beside them that come from the source.
        own: Of the index, the model card, and what else the layout says of itself.
    """

    weights: int
    companions: int
    own: int

    @property
    def total(self) -> int:
        """Of all files together."""
        return self.weights + self.companions + self.own


def planned_size(plan: RelayoutPlan, checkpoint: Checkpoint, placement: Placement) -> PlannedSize:
    """The sizes of all files of a layout that is written without measured recall.

    Reads the model card of the source, of the weights only their headers.
    """
    card = len(model_card(checkpoint, plan.options.layout, placement).encode())
    # Of a companion the index says its name, size and digest.
    sizes = {stored_name(name): (checkpoint.directory / name).stat().st_size for name in plan.companions}
    if plan.bundled is not None:
        document = flash_document(
            plan.bundled,
            placement,
            _DIGEST,
            dict.fromkeys(_digested(plan.bundled), _DIGEST),
            _described(sizes.items()),
            checkpoint.origin,
        )
        return PlannedSize(plan.weight_bytes, plan.companion_bytes, card + len(index_text(document).encode()))
    kept = {to: len(checkpoint.read_beside(name)) for name, to in kept_files(checkpoint).items()}
    described = _described([*sizes.items(), *kept.items()])
    files = _described((file.path.name, file.size) for file in checkpoint.files)
    document = permuted_document(
        moved_pieces(checkpoint, plan.blocks),
        placement,
        files,
        names_of_originals(described),
        described,
        checkpoint.origin,
    )
    own = card + len(index_text(document).encode()) + placement.size
    return PlannedSize(plan.weight_bytes, plan.companion_bytes + sum(kept.values()), own)


def own_bytes(
    checkpoint: Checkpoint, blocks: Sequence[FFNBlock], placement: Placement, bundled: BundledPlan | None
) -> int:
    """Roughly the bytes of a layout's index, and of the placement that a permuted one keeps, without spelling them.

    Args:
        bundled: The plan of its flash file; None for a permuted layout.
    """
    if bundled is not None:
        return flash_index_bytes(bundled)
    return placement.size + permuted_index_bytes(moved_pieces(checkpoint, blocks), len(blocks))


def _digested(plan: BundledPlan) -> list[str]:
    """The small tensors whose digests the index of a bundled layout has."""
    blocks = [place.tensor for block in plan.blocks for place in (block.order, block.frequency)]
    return [ORDERING_SEQUENCES, *blocks, *(source.stored.tensor for source in plan.sources)]


def _described(sizes: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "bytes": nbytes, "sha256": _DIGEST} for name, nbytes in sizes]
