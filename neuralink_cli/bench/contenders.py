"""What a bench replays: layouts (or placements without one), and the held-out tokens of a trace of the same model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.devices.device import DeviceModel, default_device, stated_device
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.input_file import require_reachable
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.plan import BundledPlan, FlashBlock
from neuralink_cli.placement.gain import total_gain
from neuralink_cli.placement.held_out import Range, sequence_starts_in, unseen_ranges
from neuralink_cli.placement.placement import Placement

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ContenderBlock:
    """One block of a contender.

    Attributes:
        threshold: A neuron fires if its signal is beyond this.
        stride: Bytes of a bundle.
        parts: Stretches that a bundle consists of.
        pinned: Slots from 0 on that are kept in DRAM.
        order: int32 `[n]`, `order[slot] = neuron`.
        frequency: float32 `[n]`, by slot, how often a neuron fired for the tokens that made the order.
        offset: Where the bundles start in the flash file, in bytes; None if there is no such file.
    """

    id: str
    neurons: int
    threshold: float
    stride: int
    parts: int
    pinned: int
    order: Order
    frequency: npt.NDArray[np.float32]
    offset: int | None


@dataclass(frozen=True, eq=False)
class Contender:
    """A layout, or a placement, whose reads are to be measured.

    Attributes:
        path: Directory of the layout, or the placement file.
        order: Name of its order.
        bundled: Whether `path` is a bundled layout, which can be read for real.
        parameters: Those of `cluster`.
        seen: Digests of the sequences that made the order.
        resident_bytes: Bytes of the FFN rows that it keeps out of the bundles, in DRAM.
    """

    path: Path
    order: str
    fingerprint: str
    signal: str
    bundled: bool
    parameters: Mapping[str, Any]
    blocks: tuple[ContenderBlock, ...]
    seen: frozenset[bytes]
    resident_bytes: int = 0

    @property
    def bundle_bytes(self) -> int:
        """Bytes of all bundles."""
        return sum(block.neurons * block.stride for block in self.blocks)


def read_contender(path: Path, trace: Trace) -> Contender:
    """Read what a bench needs to know about a layout or placement.

    Raises:
        InputError: The path is neither, or malformed.
        VerificationError: Files of the layout do not fit each other.
        MismatchError: The trace is of another model.
    """
    require_reachable(path)
    if path.exists() and not path.is_dir():
        with Placement(path) as placement:
            contender = _from_placement(path, placement, trace)
    else:
        with open_layout(path) as layout:
            if layout.kind == "permuted":
                contender = _from_placement(path, layout.placement, trace)
            else:
                contender = _from_bundled(path, layout)
    _check_same_model(contender, trace)
    return contender


def _from_bundled(path: Path, layout: BundledLayout) -> Contender:
    document = layout.index.document
    blocks = tuple(
        _flash_block(block, layout.order(block.id), layout.file.read(block.frequency.tensor).view("<f4"))
        for block in layout.index.blocks
    )
    return Contender(
        path=path,
        order=str(document["gain"].get("held_out", {}).get("chosen", "stored")),
        fingerprint=layout.fingerprint,
        signal=document["signal"],
        bundled=True,
        parameters=document["provenance"].get("parameters", {}),
        blocks=blocks,
        seen=_digests(layout.ordering_sequences),
        resident_bytes=_resident_row_bytes(layout.index.blocks),
    )


def planned_contender(path: Path, plan: BundledPlan, placement: Placement, trace: Trace) -> Contender:
    """A bundled layout that is only planned: what `read_contender` would read once it is written.

    Args:
        path: What to call it by.

    Raises:
        MismatchError: The trace is of another model than the placement.
    """
    info = placement.info
    blocks = [(block, placement.blocks[block.id]) for block in plan.blocks]
    contender = Contender(
        path=path,
        order=total_gain(info).chosen,
        fingerprint=info.model["fingerprint"],
        signal=info.signal,
        bundled=True,
        parameters=info.parameters,
        blocks=tuple(replace(_flash_block(block, by.order, by.frequency), offset=None) for block, by in blocks),
        seen=_digests(placement.ordering_sequences),
        resident_bytes=_resident_row_bytes(plan.blocks),
    )
    _check_same_model(replace(contender, path=placement.path), trace)
    return contender


def _flash_block(block: FlashBlock, order: Order, frequency: npt.NDArray[np.float32]) -> ContenderBlock:
    return ContenderBlock(
        id=block.id,
        neurons=block.neurons,
        threshold=block.threshold,
        stride=block.stride,
        parts=len(block.parts),
        pinned=block.pinned,
        order=order,
        frequency=frequency,
        offset=block.bundles.offset,
    )


def _resident_row_bytes(blocks: Sequence[FlashBlock]) -> int:
    return sum(kept.place.bytes for block in blocks for kept in block.resident if kept.kind == "rows")


def _from_placement(path: Path, placement: Placement, trace: Trace) -> Contender:
    info = placement.info
    all_parts = {block.id: len(block.part_bytes) for block in trace.info.blocks}
    gate_resident = info.parameters.get("resident") == "gate"
    kept = int(gate_resident)
    blocks = tuple(
        ContenderBlock(
            id=block.id,
            neurons=block.neurons,
            threshold=block.threshold,
            stride=block.bundle_bytes,
            parts=max(all_parts.get(block.id, 1) - kept, 1),
            pinned=block.pinned,
            order=placement.blocks[block.id].order,
            frequency=placement.blocks[block.id].frequency,
            offset=None,
        )
        for block in info.blocks
    )
    order = total_gain(info).chosen
    return Contender(
        path=path,
        order=order,
        fingerprint=info.model["fingerprint"],
        signal=info.signal,
        bundled=False,
        parameters=info.parameters,
        blocks=blocks,
        seen=_digests(placement.ordering_sequences),
        resident_bytes=sum(_firing_row_bytes(block) for block in trace.info.blocks) if gate_resident else 0,
    )


def _firing_row_bytes(block: TraceBlock) -> int:
    """Bytes of the rows that decide which neurons of a block fire."""
    return block.neurons * block.part_bytes[block.firing_role]


def _digests(sequences: Bytes) -> frozenset[bytes]:
    return frozenset(digest.tobytes() for digest in sequences)


def _check_same_model(contender: Contender, trace: Trace) -> None:
    traced = trace.info
    if contender.fingerprint != traced.model["fingerprint"]:
        raise MismatchError(
            f"is of the model {contender.fingerprint}, but the trace {trace.path} is of {traced.model['fingerprint']}",
            where=contender.path,
            fix="pass a trace of the same checkpoint",
        )
    if contender.signal != traced.signal:
        raise MismatchError(
            f"its neurons fire by the {contender.signal!r} signal, but those of {trace.path} by {traced.signal!r}",
            where=contender.path,
        )
    found = [(block.id, block.neurons) for block in contender.blocks]
    if found != [(block.id, block.neurons) for block in traced.blocks]:
        raise MismatchError(
            f"its blocks differ from those of the trace {trace.path}",
            where=contender.path,
            fix="profile the model that it was made from",
        )
    if [block.threshold for block in contender.blocks] != [block.threshold for block in traced.blocks]:
        _LOGGER.info("%s: its thresholds differ from the trace, where neurons fire more or less often", contender.path)


@dataclass(frozen=True)
class TokenRange:
    """Tokens `start` to `stop` of a trace, all of one source."""

    source: str
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


def choose_tokens(
    trace: Trace, contenders: Sequence[Contender], held_out: float | None, most: int | None
) -> tuple[TokenRange, ...]:
    """The tokens to replay, in whole sequences: those that made no order of the contenders.

    Args:
        held_out: Look only at this last share of each source's tokens; 1 for all tokens, also those that made an order.
        most: Take no more tokens than this, from the start of each source's, in proportion.

    Raises:
        OptionError: Every token made an order.
    """
    seen = frozenset[bytes]().union(*(contender.seen for contender in contenders))
    every = held_out is not None and held_out >= 1
    found: list[tuple[Range, ...]] = []
    for start, stop in trace.source_ranges():
        first = start if held_out is None else stop - round((stop - start) * held_out)
        starts = sequence_starts_in(trace, [(first, stop)])
        # A sequence that the share cuts is left out.
        whole = starts[np.isin(starts, trace.sequence_starts)]
        tail = (int(whole[0]), stop) if whole.size else (stop, stop)
        found.append(unseen_ranges(trace, tail, frozenset() if every else seen))
    total = sum(stop - start for ranges in found for start, stop in ranges)
    _tell_of_seen(trace, seen, total, every)
    if total == 0:
        raise OptionError(
            f"every token of {trace.path} made the order, so none can measure it",
            fix="pass a trace of other text, or hold some out in `cluster --held-out 0.2`; "
            "`bench --all-tokens` measures them all the same",
        )
    share = min(1.0, most / total) if most is not None else 1.0
    return tuple(
        TokenRange(source.name, *part)
        for source, ranges in zip(trace.info.sources, found, strict=True)
        for part in _first_tokens(ranges, share)
    )


def _tell_of_seen(trace: Trace, seen: frozenset[bytes], replayed: int, every: bool) -> None:
    known = np.array([digest.tobytes() in seen for digest in trace.sequence_digests])
    tokens = int(trace.sequence_lengths[known].sum(dtype=np.int64))
    if every and tokens:
        _LOGGER.warning("%s of the tokens made the order, so these figures are not held out", f"{tokens:,}")
    elif tokens and replayed:
        _LOGGER.info("%s tokens that made the order are left out", f"{tokens:,}")


def _first_tokens(ranges: Sequence[Range], share: float) -> Iterator[Range]:
    """The first tokens of some ranges, that share of all of them, rounded up."""
    total = sum(stop - start for start, stop in ranges)
    left = -(-int(total * share * 1e6) // 10**6)
    for start, stop in ranges:
        taken = min(stop - start, left)
        if taken:
            yield start, start + taken
        left -= taken


def first_tokens(tokens: Sequence[TokenRange], most: int) -> tuple[TokenRange, ...]:
    """At most about so many of some tokens, from the start of each source's, in proportion; at least one of each."""
    share = min(1.0, most / sum(part.tokens for part in tokens))
    by_source = groupby(tokens, lambda part: part.source)
    return tuple(
        TokenRange(source, *part)
        for source, parts in by_source
        for part in _first_tokens([(each.start, each.stop) for each in parts], share)
    )


def device_made_for(contender: Contender) -> DeviceModel:
    """The device model that a contender was made for; the default one if it does not say."""
    return stated_device(contender.parameters, contender.path) or default_device()


def tell_of_differences(contenders: Sequence[Contender], *, devices: bool) -> None:
    """Say what else differs between contenders than their order: their gains are over the first one's baseline.

    Args:
        devices: Also say which devices they were made for: one of these is what they are replayed on.
    """
    first = contenders[0]
    for other in contenders[1:]:
        sizes = [
            contender.bundle_bytes // sum(block.neurons for block in contender.blocks) for contender in (first, other)
        ]
        if sizes[0] != sizes[1]:
            _LOGGER.info(
                "bundles of %s have %s bytes, those of %s %s: "
                "both gains are over one baseline, with bundles of the first size",
                first.path,
                f"{sizes[0]:,}",
                other.path,
                f"{sizes[1]:,}",
            )
        if devices and device_made_for(other) != device_made_for(first):
            _LOGGER.info(
                "%s was made for %s, %s for %s",
                first.path,
                device_made_for(first).name,
                other.path,
                device_made_for(other).name,
            )
