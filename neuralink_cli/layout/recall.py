"""What rounding the rows that decide firing does to what fires, as the index of a layout states it.

It takes a running model to measure, so `evaluation/gate_recall.py` does; here is what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.layout.plan import BundledPlan, BundlePart, FlashBlock, ResidentTensor
from neuralink_cli.placement.placement import Placement, PlacementHeader
from neuralink_cli.weight_formats.formats import ROUNDING_FORMATS

# Figures are stated to this many decimals: the last digits of sums depend on the machine that ran the model.
_DECIMALS = 5


@dataclass(frozen=True)
class GateRecall:
    """What fires by rounded rows, beside what fires by those of the source, on the same hidden states.

    Attributes:
        recall: Share of the neurons that fire in the source that fire by the rounded rows too.
        read_ratio: How many neurons fire by the rounded rows, over those that fire in the source.
        lost_signal: Share of the signal, summed by magnitude, of the neurons that are missed.
    """

    recall: float
    read_ratio: float
    lost_signal: float

    def rounded(self) -> GateRecall:
        """The figures as they are stated."""
        return GateRecall(*(round(value, _DECIMALS) for value in (self.recall, self.read_ratio, self.lost_signal)))

    def __str__(self) -> str:
        return (
            f"{self.recall:.2%} of the neurons that fire are found, {self.lost_signal:.2%} of the signal is missed, "
            f"{self.read_ratio:.2f} times as many are read"
        )


@dataclass(frozen=True)
class MeasuredRecall:
    """The recall of a layout on a text.

    Attributes:
        tokens: Tokens of the text that the source ran on.
        tokens_sha256: SHA-256 of these tokens as little-endian int32, sequence after sequence.
        total: Of all blocks together, experts with the tokens routed to them.
        blocks: By block. Blocks of which no neuron fired are left out, as experts to which no token was routed.
        routed: Of each expert in `blocks`, the tokens that were routed to it.
    """

    tokens: int
    tokens_sha256: str
    total: GateRecall
    blocks: Mapping[str, GateRecall]
    routed: Mapping[str, int]

    def __str__(self) -> str:
        block, lowest = min(self.blocks.items(), key=lambda found: found[1].recall)
        routed = f" (on {self.routed[block]:,} tokens routed to it)" if block in self.routed else ""
        return f"on {self.tokens:,} tokens, {self.total}; recall is lowest in {block}, {lowest.recall:.2%}{routed}"

    def as_document(self) -> dict[str, Any]:
        """For the index."""
        return {
            "tokens": self.tokens,
            "tokens_sha256": self.tokens_sha256,
            "total": asdict(self.total),
            "blocks": [
                {"id": block, **asdict(recall), **({"routed": self.routed[block]} if block in self.routed else {})}
                for block, recall in self.blocks.items()
            ],
        }


@dataclass(frozen=True)
class MeasureRecall:
    """What runs the source of a planned layout.

    Attributes:
        memory_bytes: The peak of memory that it takes; loads what it needs to run models.
        measure: Called when everything else about the layout is decided and checked.
    """

    memory_bytes: Callable[[BundledPlan, Checkpoint], int]
    measure: Callable[[BundledPlan, Checkpoint, Placement, Architecture], MeasuredRecall]


def parse_recall(document: Mapping[str, Any]) -> MeasuredRecall:
    """What `as_document` made, from an index that was checked against its schema."""
    blocks = {
        block["id"]: GateRecall(**{name: value for name, value in block.items() if name not in ("id", "routed")})
        for block in document["blocks"]
    }
    routed = {block["id"]: block["routed"] for block in document["blocks"] if "routed" in block}
    total = GateRecall(**document["total"])
    return MeasuredRecall(document["tokens"], document["tokens_sha256"], total, blocks, routed)


def firing_rows(block: FlashBlock) -> BundlePart | ResidentTensor:
    """The rows that decide what fires: kept apart, or the first part of the bundles."""
    return next((kept for kept in block.resident if kept.kind == "rows"), block.parts[0])


def decided_by_rounding(blocks: Sequence[FlashBlock]) -> tuple[FlashBlock, ...]:
    """The blocks in which rounded rows decide what fires. MXFP4 that was carried over is not rounded."""
    return tuple(block for block in blocks if firing_rows(block).weights in ROUNDING_FORMATS)


def decided_by_rounded_rows(plan: BundledPlan, placement: Placement) -> bool:
    """Whether rounded rows are compared with thresholds other than 0, so that it is not plain what they miss."""
    return placement.info.signal == "gate" and any(block.threshold > 0 for block in decided_by_rounding(plan.blocks))


def require_measurable(
    plan: BundledPlan | None, placement: PlacementHeader, architecture: Architecture, option: str
) -> BundledPlan:
    """Check that the recall of a planned layout can be measured.

    Args:
        option: The option that asks for it, for errors.

    Raises:
        OptionError: No rows that decide firing are rounded, or they decide firing only together with others.
        UnsupportedError: The model does not read text, or it runs code of its own.
    """
    if plan is None or not decided_by_rounding(plan.blocks):
        raise OptionError(
            "no rows that decide firing are rounded, so there is no loss to measure", where=option, fix="leave it out"
        )
    if placement.signal != "gate":
        raise OptionError(
            f"neurons fire by the signal {placement.signal!r} of the placement, not by these rows alone",
            where=option,
            fix="leave it out",
        )
    if architecture.task == "image-encoder":
        raise UnsupportedError("the model reads images, not text", where=option, fix="leave it out")
    if placement.model.get("code") == "run":
        raise UnsupportedError(
            "the model runs Python code of its own, which `relayout` does not",
            where=option,
            fix="leave it out; `verify --forward --trust-remote-code` measures recall too",
        )
    return plan
