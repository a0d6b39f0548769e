"""How two traces, placements or layouts differ: model, data, options, devices, formats, orders, and what they cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import TokenRange, choose_tokens, device_made_for, read_contender
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio, bootstrap_ratios
from neuralink_cli.errors import InputError, MismatchError, OptionError
from neuralink_cli.inspection.costs import measure_orders
from neuralink_cli.inspection.facts import Facts, read_facts
from neuralink_cli.inspection.kinds import (
    PERMUTED_LAYOUT,
    PLACED_KINDS,
    PLACEMENT,
    TRACE,
    Found,
    recognise,
    with_article,
)
from neuralink_cli.inspection.shared_order import neighbours_kept, read_orders
from neuralink_cli.progress import Progress, no_progress

_SECTIONS = ("kind", "model", "origin", "signal", "calibration", "coverage", "data", "options", "device", "format")
_BLOCK_STATEMENTS = ("neurons", "hidden", "activation", "threshold", "bundle_bytes", "pinned", "order")


@dataclass(frozen=True)
class Difference:
    """A statement that differs, such as `device.name`; None where one of the two does not make it."""

    what: str
    first: Any
    second: Any


@dataclass(frozen=True)
class SharedOrder:
    """A block of both: the share of the pairs of adjacent neurons of one order that are adjacent in the other."""

    id: str
    neurons: int
    neighbours_kept: float


@dataclass(frozen=True)
class SharedSequences:
    """Sequences of tokens, in a trace or of those that made an order: how many each has, and how many both have."""

    first: int
    second: int
    both: int


@dataclass(frozen=True)
class CostComparison:
    """What two orders cost on the same tokens, with pinned neurons left out and no other cache.

    Attributes:
        device: What is modelled.
        tokens: That were replayed; those that made either order are left out.
        first_seconds, second_seconds: Mean I/O time of a token.
        ratio: The time of the first over that of the second, with a 95 % bootstrap interval over sequences.
        blocks: The same by block id.
    """

    trace: str
    device: str
    tokens: tuple[TokenRange, ...]
    first_seconds: float
    second_seconds: float
    ratio: Ratio
    blocks: Mapping[str, Ratio]


@dataclass(frozen=True)
class DiffReport:
    """How two artefacts differ.

    Attributes:
        first_kind, second_kind: As in `kinds`.
        same_model: Whether they are of the same checkpoint.
        same_content: Whether they are the same to the last bit, as far as their digests say.
        differences: Statements that differ. Those of blocks are by block id; `blocks` has ids that only one has.
        sequences: Of the traces, or those that made the orders.
        blocks: Those that both have with as many neurons; empty for traces.
        neighbours_kept: All blocks together; None for traces, or if no block is in both.
        cost: None if no trace was given.
    """

    first: str
    second: str
    first_kind: str
    second_kind: str
    same_model: bool
    same_content: bool
    differences: tuple[Difference, ...]
    sequences: SharedSequences
    blocks: tuple[SharedOrder, ...]
    neighbours_kept: float | None
    cost: CostComparison | None


def diff(
    first: Path,
    second: Path,
    *,
    trace: Path | None = None,
    device: DeviceModel | None = None,
    progress: Progress = no_progress,
) -> DiffReport:
    """Compare two traces, or two placements or layouts of any kind.

    Args:
        trace: Of the same model, to cost both orders on; tokens that made one of them are left out.
        device: Device to cost them on; by default the device the first was made for.

    Raises:
        InputError: One of them is something else, or damaged.
        VerificationError: Files of a layout do not fit each other.
        MismatchError: A trace and an order; or a trace of another model.
        OptionError: A trace to cost traces on, or every token of it made one of the orders.
    """
    found = recognise(first), recognise(second)
    for each in found:
        if each.kind not in (TRACE, *PLACED_KINDS):
            raise InputError(
                f"is {with_article(each.kind)}, which cannot be compared",
                where=each.path,
                fix="pass two traces, or two placements or layouts",
            )
    traces = [each.kind == TRACE for each in found]
    if traces[0] != traces[1]:
        raise MismatchError(
            f"is {with_article(found[0].kind)}, but {second} is {with_article(found[1].kind)}",
            where=first,
            fix="compare two traces, or two placements or layouts",
        )
    if traces[0] and trace is not None:
        raise OptionError(
            "--trace compares what orders cost, but traces have no order", fix="pass placements or layouts"
        )
    one, other = (read_facts(each) for each in found)
    sequences, blocks = (_shared_tokens(*found), ()) if traces[0] else _shared_orders(*found)
    pairs = sum(max(block.neurons - 1, 0) for block in blocks)
    kept = sum(max(block.neurons - 1, 0) * block.neighbours_kept for block in blocks)
    return DiffReport(
        first=str(first),
        second=str(second),
        first_kind=one.kind,
        second_kind=other.kind,
        same_model=one.model["fingerprint"] == other.model["fingerprint"],
        same_content=one.kind == other.kind and one.digests == other.digests,
        differences=tuple(_differences(one, other)),
        sequences=sequences,
        blocks=blocks,
        neighbours_kept=kept / pairs if pairs else None,
        cost=None if trace is None else _compare_costs(first, second, trace, device, progress),
    )


def _differences(one: Facts, other: Facts) -> Iterator[Difference]:
    stated, beside = _statements(one), _statements(other)
    same_kind = one.kind == other.kind
    # What is of the same section stays together, in the order of a table.
    for what in sorted(dict.fromkeys((*stated, *beside)), key=lambda name: _SECTIONS.index(re.split("[. ]", name)[0])):
        values = stated.get(what), beside.get(what)
        # What only one kind of artefact says is no difference.
        if values[0] != values[1] and (same_kind or what.startswith("data ") or None not in values):
            yield Difference(what, *values)
    yield from _block_differences(one, other)


def _statements(facts: Facts) -> dict[str, Any]:
    """What an artefact says that another one may say differently, by dotted names; in the order of a table."""
    found: dict[str, Any] = {"kind": facts.kind}
    found |= _flat("model", facts.model)
    found |= _flat("origin", facts.origin or {})
    found |= {"signal": facts.signal} | _flat("calibration", facts.calibration or {})
    found |= _flat("coverage", facts.coverage or {})
    for source in facts.data:
        found |= _flat(f"data {source['name']}", {key: source[key] for key in ("revision", "sha256", "tokens")})
    found |= _flat("options", facts.options)
    found |= _flat("device", facts.device or {})
    if facts.kind not in (PLACEMENT, PERMUTED_LAYOUT):
        found |= _flat("format", facts.formats)
    return {what: value for what, value in found.items() if value is not None}


def _block_differences(one: Facts, other: Facts) -> Iterator[Difference]:
    """What blocks of the two say differently, as values by block id: of those that differ only."""
    first, second = ({block.id: block for block in facts.blocks} for facts in (one, other))
    both = [name for name in first if name in second]
    for key in _BLOCK_STATEMENTS:
        pairs = {name: (getattr(first[name], key), getattr(second[name], key)) for name in both}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and None not in pair}
        if differing:
            values = [{name: pair[side] for name, pair in differing.items()} for side in (0, 1)]
            yield Difference(f"blocks.{key}", *values)
    only = [[name for name in mine if name not in its] for mine, its in ((first, second), (second, first))]
    if only[0] or only[1]:
        yield Difference("blocks", *(names or None for names in only))


def _flat(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in values.items()}


def _shared_tokens(one: Found, other: Found) -> SharedSequences:
    with Trace(one.path) as first, Trace(other.path) as second:
        return _shared(first.sequence_digests, second.sequence_digests)


def _shared_orders(one: Found, other: Found) -> tuple[SharedSequences, tuple[SharedOrder, ...]]:
    first, second = read_orders(one), read_orders(other)
    blocks = tuple(
        SharedOrder(name, order.size, neighbours_kept(order, second.orders[name]))
        for name, order in first.orders.items()
        if name in second.orders and second.orders[name].size == order.size
    )
    return _shared(first.sequences, second.sequences), blocks


def _shared(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> SharedSequences:
    first, second = ({digest.tobytes() for digest in digests} for digests in (one, other))
    return SharedSequences(len(first), len(second), len(first & second))


def _compare_costs(
    first: Path, second: Path, path: Path, device: DeviceModel | None, progress: Progress
) -> CostComparison:
    with Trace(path) as trace:
        trace.check_content()
        contenders = [read_contender(artefact, trace) for artefact in (first, second)]
        tokens = choose_tokens(trace, contenders, None, None)
        device = device or device_made_for(contenders[0])
        one, other = (costs.stored for costs in measure_orders(trace, contenders, tokens, device, progress=progress))
        names = [block.id for block in trace.info.blocks]
    pairs = [(one.sum(axis=0), other.sum(axis=0)), *zip(one, other, strict=True)]
    total, *by_block = bootstrap_ratios(pairs)
    seconds = sum(part.tokens for part in tokens) * device.bytes_per_second
    return CostComparison(
        trace=str(path),
        device=device.name,
        tokens=tokens,
        first_seconds=float(one.sum()) / seconds,
        second_seconds=float(other.sum()) / seconds,
        ratio=total,
        blocks=dict(zip(names, by_block, strict=True)),
    )
