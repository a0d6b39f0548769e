"""Merges traces of one model: appends their tokens, and joins parts of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from neuralink_cli.activations.options import SourceSummary
from neuralink_cli.activations.trace import Bits, Positions, Trace, TraceBlock, TraceSource, write_trace
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.durable import require_free
from neuralink_cli.progress import Progress, no_progress

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class MergeSummary:
    """The merged trace: its digest, its number of tokens, and its share of each dataset."""

    content_sha256: str
    tokens: int
    sources: tuple[SourceSummary, ...]


def merge_traces(
    inputs: Sequence[Path],
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> MergeSummary:
    """Write the trace that has the tokens of all inputs, in the order given.

    Sources that continue the source before them become one, so that the parts of a run, merged in order, give the
    same bytes as the whole run.

    Raises:
        InputError: An input is not a trace, or damaged.
        MismatchError: The inputs differ in model, signal, thresholds or blocks, or hold the same sequences twice.
        OptionError: There is no input.
        OutputError: As `write_trace`.
    """
    if not inputs:
        raise OptionError("no traces to merge")
    require_free(output, overwrite)
    with ExitStack() as stack:
        traces = [stack.enter_context(closing(Trace(path))) for path in inputs]
        for trace in traces[1:]:
            _require_same_run(traces[0], trace)
        _require_distinct(traces)
        for trace in traces:
            trace.check_content()
        first = traces[0].info
        header = replace(
            first,
            # The same checkpoint, whether from the hub or from a local copy.
            origin=next((trace.info.origin for trace in traces if trace.info.origin is not None), None),
            blocks=tuple(_joined_block(traces, index) for index in range(len(first.blocks))),
            sources=_join(source for trace in traces for source in trace.info.sources),
        )
        index_of = {block.id: index for index, block in enumerate(first.blocks)}
        lengths = np.concatenate([trace.sequence_lengths for trace in traces])
        with progress("merge", sum(trace.header.data_bytes for trace in traces), "B") as advance:
            digest = write_trace(
                output,
                header,
                lengths,
                lambda block_id: _all_bits(traces, index_of[block_id]),
                lambda block_id: _all_tokens(traces, index_of[block_id]),
                overwrite=overwrite,
                progress=advance,
            )
    sources = tuple(SourceSummary(source.name, source.sequences, source.tokens) for source in header.sources)
    return MergeSummary(digest, header.tokens, sources)


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
    held: list[tuple[Trace, TraceSource]] = []
    for trace in traces:
        for source in trace.info.sources:
            for other, earlier in held:
                if other is not trace and _same_data(earlier, source) and _overlap(earlier, source):
                    raise _mismatch(other, trace, f"the same sequences of {source.name!r}", verb="both have")
            held.append((trace, source))


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
        for start in range(0, trace.info.tokens, rows):
            yield trace.fired(block, start, min(start + rows, trace.info.tokens))


def _all_tokens(traces: Sequence[Trace], index: int) -> Iterator[Positions]:
    before = 0
    for trace in traces:
        yield (trace.tokens_of(trace.info.blocks[index]).astype(np.int64) + before).astype(np.uint32)
        before += trace.info.tokens


def _mismatch(
    first: Trace, other: Trace, difference: str, *, verb: str = "have", fix: str | None = None
) -> MismatchError:
    return MismatchError(f"cannot be merged with {first.path}: they {verb} {difference}", where=other.path, fix=fix)
