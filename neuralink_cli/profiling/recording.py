"""Recording a run, in one process or several, and writing its trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli.activations.options import BlockSummary, ProfileSummary, SourceSummary
from neuralink_cli.activations.spool import TOKEN_BYTES, Spool
from neuralink_cli.activations.trace import (
    TraceBlock,
    TraceHeader,
    TraceSource,
    bytes_per_token,
    trace_block,
    write_trace,
)
from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.calibration.sequences import Batch
from neuralink_cli.calibration.sources import CalibrationData, share_of
from neuralink_cli.files.durable import require_space
from neuralink_cli.profiling.ranks import Ranks, Rows
from neuralink_cli.profiling.subject import Subject
from neuralink_cli.progress import Progress

if TYPE_CHECKING:
    from neuralink_cli.profiling.recorder import HookedModel


@dataclass(frozen=True)
class Thresholds:
    """The threshold of each block, and how they were found (None if they are all 0)."""

    values: tuple[float, ...]
    calibration: Mapping[str, Any] | None


@dataclass(frozen=True)
class Run:
    """Everything that is known before recording starts. `batches` are those of all ranks."""

    subject: Subject
    signal: str
    thresholds: Thresholds
    hooked: HookedModel
    data: CalibrationData
    batches: Sequence[Batch]
    ranks: Ranks


@dataclass(frozen=True)
class Recorded:
    """What a rank recorded.

    Attributes:
        active: For each block, the bits that are set.
        rows: For each block, the rows.
        of_sources: For each source by its number, the bits that are set and all of them.
    """

    active: Sequence[int]
    rows: Sequence[int]
    of_sources: Mapping[int, tuple[int, int]]


def record_trace(run: Run, output: Path, *, overwrite: bool, progress: Progress) -> ProfileSummary:
    """Record the batches, each rank its share, and have rank 0 write the trace.

    Raises:
        InputError: A signal is NaN.
        OutputError: The trace cannot be written or does not fit on the disk.
        WorkerError: Another rank failed or died.
    """
    from neuralink_cli.profiling.preflight import telling_time
    from neuralink_cli.profiling.recorder import record

    subject, thresholds, data, batches, ranks = run.subject, run.thresholds, run.data, run.batches, run.ranks
    blocks = tuple(
        trace_block(block, threshold) for block, threshold in zip(subject.blocks, thresholds.values, strict=True)
    )
    header = TraceHeader(
        model=subject.stated_identity,
        origin=subject.origin,
        signal=run.signal,
        calibration=thresholds.calibration,
        blocks=blocks,
        sources=trace_sources(data, batches),
        coverage={"covered_bytes": subject.coverage.covered_bytes, "ffn_bytes": subject.coverage.ffn_bytes},
    )
    row_bytes = [block.row_bytes for block in blocks]
    own = ranks.share(batches)
    place = ranks.place(output)
    require_space(place, _space_needed(subject, batches, ranks))
    with Spool(place, row_bytes) as spool:
        with ranks.progress(progress)("recording", header.tokens, "token") as advance:
            timed = telling_time(advance, header.tokens, ranks.count)
            before = _tokens(batches[: batches.index(own[0])])
            sources = [batch.source for batch in own]
            active, of_sources = record(run.hooked, thresholds.values, data.inputs(own), spool, timed, sources, before)
        recorded = ranks.collect(Recorded(active, [spool.count(k) for k in range(len(blocks))], of_sources))
        counts = [each.rows for each in recorded]
        header = replace(header, blocks=tuple(map(routed, blocks, map(sum, zip(*counts, strict=True)))))
        sizes = [(block.row_bytes, 0 if block.routed is None else TOKEN_BYTES) for block in blocks]
        ranks.pass_on_remarks()
        if ranks.rank:
            ranks.send_rows(spool, sizes)
            digest = ranks.tell("")
        else:
            rows = ranks.all_rows(spool, sizes, counts)
            digest = ranks.tell(_write(run, output, header, rows, overwrite=overwrite, progress=progress))
    return _summarize(header, recorded, digest, subject.coverage)


def _write(run: Run, output: Path, header: TraceHeader, rows: Rows, *, overwrite: bool, progress: Progress) -> str:
    """Write the trace and return its digest."""
    data, batches = run.data, run.batches
    index_of = {block.id: index for index, block in enumerate(header.blocks)}
    lengths, digests = data.sequence_lengths(batches), data.sequence_digests(batches)
    carried = data.sequence_carried(batches)
    size = sum((header.tokens if block.routed is None else block.routed) * block.row_bytes for block in header.blocks)
    with progress("writing", size + lengths.nbytes + digests.nbytes + carried.nbytes, "B") as advance:
        return write_trace(
            output,
            header,
            lengths,
            digests,
            lambda block: rows.rows(index_of[block]),
            lambda block: rows.tokens(index_of[block]),
            sequence_carried=carried,
            overwrite=overwrite,
            progress=advance,
        )


def _space_needed(subject: Subject, batches: Sequence[Batch], ranks: Ranks) -> int:
    """Bytes that the ranks on this machine write: what each records to its spool, and at rank 0 all to the trace."""
    spooled = sum(_tokens(batches[share_of(len(batches), rank, ranks.count)]) for rank in ranks.here)
    written = _tokens(batches) if 0 in ranks.here else 0
    return round((spooled + written) * bytes_per_token(subject.blocks))


def _tokens(batches: Iterable[Batch]) -> int:
    return sum(batch.tokens for batch in batches)


def trace_sources(data: CalibrationData, batches: Iterable[Batch]) -> tuple[TraceSource, ...]:
    """The part of each source in consecutive batches, for the trace."""
    found = []
    for index, group in groupby(batches, lambda batch: batch.source):
        of_source = list(group)
        source = data.sources[index]
        found.append(
            TraceSource(
                name=source.name,
                sha256=source.sha256,
                first_sequence=of_source[0].first,
                sequences=of_source[-1].stop - of_source[0].first,
                total_sequences=len(source.lengths),
                tokens=sum(batch.tokens for batch in of_source),
                parameters=source.parameters,
            )
        )
    return tuple(found)


def routed(block: TraceBlock, rows: int) -> TraceBlock:
    """A block with the number of its rows, if it is an expert."""
    return block if block.routed is None else replace(block, routed=rows)


def _summarize(header: TraceHeader, recorded: Sequence[Recorded], digest: str, coverage: Coverage) -> ProfileSummary:
    active = map(sum, zip(*(each.active for each in recorded), strict=True))
    # Ranks record one source after the other, so this is the order of the trace.
    of_sources: dict[int, list[tuple[int, int]]] = {}
    for each in recorded:
        for source, counts in each.of_sources.items():
            of_sources.setdefault(source, []).append(counts)
    totals = [[sum(column) for column in zip(*counts, strict=True)] for counts in of_sources.values()]
    shares = [fired / bits if bits else 0.0 for fired, bits in totals]

    def summarize_block(block: TraceBlock, fired: int) -> BlockSummary:
        tokens = header.tokens if block.routed is None else block.routed
        ratio = fired / (tokens * block.neurons) if tokens else 0.0
        return BlockSummary(block.id, block.neurons, block.threshold, tokens, ratio)

    return ProfileSummary(
        content_sha256=digest,
        origin=header.origin,
        tokens=header.tokens,
        signal=header.signal,
        calibration=header.calibration,
        blocks=tuple(summarize_block(block, fired) for block, fired in zip(header.blocks, active, strict=True)),
        sources=tuple(
            SourceSummary(source.name, source.sequences, source.tokens, share)
            for source, share in zip(header.sources, shares, strict=True)
        ),
        coverage=coverage,
    )
