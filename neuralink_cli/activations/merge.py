"""Merges traces of one model: appends their tokens, and joins parts of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np

from neuralink_cli.activations.options import SourceSummary
from neuralink_cli.activations.trace import (
    Bits,
    Positions,
    Trace,
    TraceBlock,
    TraceSource,
    require_countable,
    write_trace,
)
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.stage_file import require_stage_output
from neuralink_cli.progress import Progress, no_progress

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 22
_ONCE = "pass each part and each dataset once"


@dataclass(frozen=True)
class MergeSummary:
    """The merged trace: its digest, its number of tokens, its share of each dataset, and its `coverage`."""

    content_sha256: str
    tokens: int
    sources: tuple[SourceSummary, ...]
    coverage: Mapping[str, int] | None


def merge_traces(
    inputs: Sequence[Path],
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> MergeSummary:
    """Write the trace that has the tokens of all inputs. Their order does not matter.

    Consecutive parts of a dataset become one, so that the parts of a run give the same bytes as the whole run. A part
    that is missing is logged.

    Raises:
        InputError: An input is not a trace, or damaged.
        MismatchError: The inputs differ in model, signal, thresholds or blocks, or hold the same sequences twice.
        OptionError: There is no input.
        UnsupportedError: Together they have more tokens than 32 bits count.
        OutputError: As `write_trace`.
    """
    if not inputs:
        raise OptionError("no traces to merge")
    require_stage_output(output, overwrite)
    with ExitStack() as stack:
        traces = [stack.enter_context(closing(Trace(path))) for path in inputs]
        for trace in traces[1:]:
            _require_same_run(traces[0], trace)
        require_countable(sum(trace.info.tokens for trace in traces), output)
        _require_distinct(traces)
        for trace in traces:
            trace.check_content()
        traces = _in_order(traces)
        first = traces[0].info
        header = replace(
            first,
            # The same checkpoint, whether from the hub or from a local copy.
            origin=next((trace.info.origin for trace in traces if trace.info.origin is not None), None),
            coverage=next((trace.info.coverage for trace in traces if trace.info.coverage is not None), None),
            blocks=tuple(_joined_block(traces, index) for index in range(len(first.blocks))),
            sources=_join(source for trace in traces for source in trace.info.sources),
        )
        _tell_of_gaps(header.sources)
        index_of = {block.id: index for index, block in enumerate(first.blocks)}
        lengths = np.concatenate([trace.sequence_lengths for trace in traces])
        digests = np.concatenate([trace.sequence_digests for trace in traces])
        carried = [trace.sequence_carried for trace in traces if trace.sequence_carried is not None]
        with progress("merge", sum(trace.header.data_bytes for trace in traces), "B") as advance:
            digest = write_trace(
                output,
                header,
                lengths,
                digests,
                lambda block_id: _all_bits(traces, index_of[block_id]),
                lambda block_id: _all_tokens(traces, index_of[block_id]),
                sequence_carried=np.concatenate(carried) if len(carried) == len(traces) else None,
                overwrite=overwrite,
                progress=advance,
            )
    sources = tuple(SourceSummary(source.name, source.sequences, source.tokens) for source in header.sources)
    return MergeSummary(digest, header.tokens, sources, header.coverage)


def _require_same_run(first: Trace, other: Trace) -> None:
    a, b = first.info, other.info
    for name in ("model", "signal", "calibration"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise _mismatch(first, other, f"{name} {ours} and {theirs}")
    if len(a.blocks) != len(b.blocks):
        raise _mismatch(first, other, f"{len(a.blocks)} and {len(b.blocks)} blocks")
    for ours, theirs in zip(a.blocks, b.blocks, strict=True):
        if ours.threshold != theirs.threshold and ours.id == theirs.id:
            raise _mismatch(
                first,
                other,
                f"thresholds {ours.threshold} and {theirs.threshold} in block {ours.id!r}",
                fix=f"profile with --thresholds-from {first.path}",
            )
        if replace(ours, routed=None) != replace(theirs, routed=None):
            raise _mismatch(first, other, f"blocks {ours} and {theirs}")


def _require_distinct(traces: Sequence[Trace]) -> None:
    """Refuse inputs that hold the same sequences: by their place in a dataset, or one dataset whole in another."""
    held: list[tuple[Trace, TraceSource, frozenset[bytes]]] = []
    for trace in traces:
        counts = np.cumsum([source.sequences for source in trace.info.sources])[:-1]
        for source, part in zip(trace.info.sources, np.split(trace.sequence_digests, counts), strict=True):
            digests = frozenset(digest.tobytes() for digest in part)
            for other, earlier, known in held:
                if other is trace:
                    continue
                if earlier.sha256 == source.sha256 and _overlap(earlier, source):
                    raise _mismatch(other, trace, f"the same sequences of {source.name!r}", verb="both have", fix=_ONCE)
                if _whole(earlier) and _whole(source) and (digests <= known or known <= digests):
                    names = f"the same text ({earlier.name!r} and {source.name!r})"
                    raise _mismatch(other, trace, names, verb="both have", fix=_ONCE)
            held.append((trace, source, digests))


def _in_order(traces: Sequence[Trace]) -> list[Trace]:
    """The inputs in an order that does not depend on how they were named: parts of a run one after the other.

    Datasets keep the order that an input has them in; those that no input has together go by name and digest.
    """
    graph: dict[str, set[str]] = {}
    names: dict[str, str] = {}
    for trace in traces:
        keys = [source.sha256 for source in trace.info.sources]
        names |= {source.sha256: source.name for source in trace.info.sources}
        for key in keys:
            graph.setdefault(key, set())
        for before, after in pairwise(keys):
            if before != after:
                graph[after].add(before)
    rank: dict[str, int] = {}
    while len(rank) < len(graph):
        free = [key for key, before in graph.items() if key not in rank and before <= rank.keys()]
        # Inputs that contradict each other have no order: any fixed one will do.
        rank[min(free or [key for key in graph if key not in rank], key=lambda key: (names[key], key))] = len(rank)
    return sorted(traces, key=lambda trace: (rank[(first := trace.info.sources[0]).sha256], first.first_sequence))


def _tell_of_gaps(sources: Sequence[TraceSource]) -> None:
    """Remark on parts of a dataset that are missing between or around those that are there."""
    parts: dict[str, list[TraceSource]] = {}
    for source in sources:
        parts.setdefault(source.sha256, []).append(source)
    for found in parts.values():
        there = sum(source.sequences for source in found)
        if there < found[0].total_sequences and len(found) > 1:
            logger.warning(
                "%s: %d of %d sequences are there; is a part missing?", found[0].name, there, found[0].total_sequences
            )


def _join(sources: Iterable[TraceSource]) -> tuple[TraceSource, ...]:
    """Sources in order, with consecutive parts of the same data joined."""

    def add(joined: tuple[TraceSource, ...], source: TraceSource) -> tuple[TraceSource, ...]:
        last = joined[-1] if joined else None
        if last is None or not _same_data(last, source) or source.first_sequence != _end(last):
            return (*joined, source)
        whole = replace(last, sequences=last.sequences + source.sequences, tokens=last.tokens + source.tokens)
        return (*joined[:-1], whole)

    return reduce(add, sources, ())


def _same_data(a: TraceSource, b: TraceSource) -> bool:
    return (a.name, a.sha256, a.total_sequences, a.parameters) == (b.name, b.sha256, b.total_sequences, b.parameters)


def _whole(source: TraceSource) -> bool:
    return source.sequences == source.total_sequences


def _overlap(a: TraceSource, b: TraceSource) -> bool:
    return a.first_sequence < _end(b) and b.first_sequence < _end(a)


def _end(source: TraceSource) -> int:
    return source.first_sequence + source.sequences


def _joined_block(traces: Sequence[Trace], index: int) -> TraceBlock:
    """A block of the merged trace. For an expert, `routed` is the sum over the traces."""
    blocks = [trace.info.blocks[index] for trace in traces]
    routed = [block.routed for block in blocks if block.routed is not None]
    return replace(blocks[0], routed=sum(routed) if routed else None)


def _all_bits(traces: Sequence[Trace], index: int) -> Iterator[Bits]:
    for trace in traces:
        block = trace.info.blocks[index]
        rows = max(_CHUNK_BYTES // block.row_bytes, 1)
        count = trace.info.tokens if block.routed is None else block.routed
        for first in range(0, count, rows):
            yield trace.read_rows(block, first, min(first + rows, count))


def _all_tokens(traces: Sequence[Trace], index: int) -> Iterator[Positions]:
    before = 0
    for trace in traces:
        block = trace.info.blocks[index]
        count, rows = block.routed or 0, max(_CHUNK_BYTES // 4, 1)
        for first in range(0, count, rows):
            part = trace.read_positions(block, first, min(first + rows, count))
            # No place is beyond 32 bits, see `require_countable`.
            yield part + np.uint32(before)
        before += trace.info.tokens


def _mismatch(
    first: Trace, other: Trace, difference: str, *, verb: str = "have", fix: str | None = None
) -> MismatchError:
    return MismatchError(f"cannot be merged with {first.path}: they {verb} {difference}", where=other.path, fix=fix)
