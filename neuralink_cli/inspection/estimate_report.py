"""What `estimate` is asked, and what it says of a layout."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.rewriting.planned_size import PlannedSize
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import DEFAULT_POLICY

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DEFAULT_EFFORT = "fast"
# How the figures came about: by replaying held-out tokens, or as the placement states them.
REPLAYED, STATED = "replayed", "stated"


@dataclass(frozen=True)
class EstimateOptions:
    """What to estimate.

    Attributes:
        layout: The options of `relayout`.
        device: Device model to read from; None for the device the placement was made for.
        budgets: DRAM for cached and pinned bundles and resident rows, as for the bench.
        policy: Name of the cache's policy.
        tokens: Replay at most this many held-out tokens; None for all, or for as many as take about a minute.
        tokens_per_second: What storage should be fast enough for.
        disk_speed: Bytes a second that the disk reads or writes, to say how long `relayout` takes; None not to say it.
        effort: How long to refine the order that is made if there is no placement.
        jobs: Blocks to order at a time; by default as many as CPUs.
    """

    layout: RelayoutOptions = field(default_factory=RelayoutOptions)
    device: DeviceModel | None = None
    budgets: tuple[DramBudget, ...] = tuple(DramBudget(fraction=share) for share in SHARES)
    policy: str = DEFAULT_POLICY
    tokens: int | None = None
    tokens_per_second: float | None = None
    disk_speed: int | None = None
    effort: str = DEFAULT_EFFORT
    jobs: int | None = None


@dataclass(frozen=True)
class BlockSizes:
    """Neighbouring blocks that are alike: how many there are, the id of the first, and bytes of a neuron's bundle."""

    first: str
    count: int
    neurons: int
    source_bytes: int
    bundle_bytes: int


@dataclass(frozen=True)
class MemoryNeeds:
    """What a runtime needs in memory for weights, as they are stored. Its program and attention cache come on top.

    Attributes:
        dense_bytes: Weights outside the FFN blocks; all weights of a permuted layout, which is loaded whole.
        resident_bytes: Rows that decide firing, and biases.
        pinned_bytes: Bundles that are always in DRAM.
        token_bytes: Bundles of the neurons that fire at a token: with less cache, a token drives out what the next one
            would have found.
        least_bytes: Of what is above together; pinned bundles are part of those of a token.
    """

    dense_bytes: int
    resident_bytes: int
    pinned_bytes: int
    token_bytes: int
    least_bytes: int


@dataclass(frozen=True)
class RelayoutNeeds:
    """What writing the layout takes, as `relayout` says before it begins.

    Attributes:
        bytes_read: Of the checkpoint.
        bytes_written: Weights and the files beside them.
        memory_bytes: Peak of resident memory.
        least_seconds: What reading and writing take together at the speed of the disk; None if it is not stated.
    """

    bytes_read: int
    bytes_written: int
    memory_bytes: int
    least_seconds: float | None


@dataclass(frozen=True)
class BudgetNeeds:
    """What reading takes per token with some DRAM, in the stored order with access collapse.

    Attributes:
        share: DRAM as a share of all bundles; None if it was given in bytes.
        dram_bytes: What cached and pinned bundles and resident rows take.
        hit_rate: Share of the active neurons that are in DRAM; None if it is not known, as `reads` and `read_bytes`.
        io_seconds: Mean time of reading.
        gain: The time of the original order, read the same way, over that of the stored one.
        gain_over_naive: That of the original order, read without access collapse, over that of the stored one.
        speed_needed: How many times as fast as the device storage must be for the tokens per second that are wanted;
            None if none are.
    """

    share: float | None
    dram_bytes: int
    hit_rate: float | None
    reads: float | None
    read_bytes: float | None
    io_seconds: float
    gain: Ratio
    gain_over_naive: Ratio
    speed_needed: float | None


@dataclass(frozen=True)
class EstimateReport:
    """What a layout will be.

    Attributes:
        order: Name of the order, "mixed" if blocks differ.
        placement: The file of the order; None if it was made for this estimate, with `effort`.
        source_bytes: Size of the checkpoint's weight files.
        device: Name of the device that is modelled.
        figures: `replayed` or `stated`; None if there are none.
        tokens: How many were replayed, out of `held_out`; None if the figures are not replayed.
        budgets: Ascending in the order they were asked for; one, without a cache, if figures are stated; empty if
            there are none.
    """

    model: str
    origin: Origin | None
    layout: str
    resident: str
    weights: str
    dense_weights: str
    order: str
    placement: str | None
    effort: str | None
    blocks: tuple[BlockSizes, ...]
    source_bytes: int
    size: PlannedSize
    memory: MemoryNeeds
    relayout: RelayoutNeeds
    device: str
    tokens_per_second: float | None
    figures: str | None
    tokens: int | None
    held_out: int | None
    budgets: tuple[BudgetNeeds, ...] = field(default=())

    def as_document(self) -> dict[str, Any]:
        """Everything for JSON."""
        document = asdict(self)
        document["size"] = {**document["size"], "total": self.size.total}
        return document
