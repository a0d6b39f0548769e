"""Profiling: runs calibration data through the model and writes a trace. Torch is imported when a run starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli import __version__
from neuralink_cli.activations.options import (
    BlockSummary,
    ProfileOptions,
    ProfileSummary,
    SourceSummary,
    ThresholdOptions,
)
from neuralink_cli.activations.ranks import ALONE, Ranks, Rows
from neuralink_cli.activations.spool import TOKEN_BYTES, Spool
from neuralink_cli.activations.threshold import EXACT_AT_ZERO
from neuralink_cli.activations.trace import (
    Trace,
    TraceBlock,
    TraceHeader,
    TraceSource,
    bytes_per_token,
    trace_block,
    write_trace,
)
from neuralink_cli.architectures.activation_names import split_cut
from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.coverage import Coverage, require_coverage
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.model_description import describe
from neuralink_cli.architectures.scales import refuse_scaled_blocks, refuse_scales
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.calibration.readers import ImageReader, TextReader
from neuralink_cli.calibration.sequences import Batch
from neuralink_cli.calibration.sources import CalibrationData, share_of
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.durable import require_free, require_space
from neuralink_cli.models.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.progress import Progress, no_progress

if TYPE_CHECKING:
    from neuralink_cli.activations.description_check import DescriptionCheck
    from neuralink_cli.activations.recorder import HookedModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """The model that is profiled, as its checkpoint describes it.

    Attributes:
        name: The model as the user wrote it.
        shapes: The shapes of all tensors.
        code: What becomes of the code that comes with the checkpoint: "run", "ignored", or None if there is none.
    """

    name: str
    directory: Path
    origin: Origin | None
    identity: Mapping[str, str]
    architecture: Architecture
    blocks: tuple[FFNBlock, ...]
    shapes: Mapping[str, tuple[int, ...]]
    coverage: Coverage
    code: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """The threshold of each block, and how they were found (None if they are all 0)."""

    values: tuple[float, ...]
    calibration: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Run:
    """Everything that is known before recording starts. `batches` are those of all ranks."""

    subject: Subject
    signal: str
    thresholds: Thresholds
    hooked: HookedModel
    data: CalibrationData
    batches: Sequence[Batch]
    ranks: Ranks


@dataclass(frozen=True)
class _Recorded:
    """What a rank recorded.

    Attributes:
        active: For each block, the bits that are set.
        rows: For each block, the rows.
        of_sources: For each source by its number, the bits that are set and all of them.
    """

    active: Sequence[int]
    rows: Sequence[int]
    of_sources: Mapping[int, tuple[int, int]]


def profile(
    model: str | Path,
    output: Path,
    data: CalibrationOptions,
    options: ProfileOptions = ProfileOptions(),
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> ProfileSummary:
    """Record which FFN neurons fire for every token of the calibration data, and write the trace to `output`.

    The same arguments give the same bytes on the same machine. Only padding is left out of the trace.

    Args:
        model: A checkpoint directory; a string may also be a hub id, see `find_model`.
        ranks: The processes that share the work, all of which call this with the same arguments. Rank 0 writes.

    Raises:
        OptionError: The options do not go together, or not with this model.
        InputError, UnsupportedError: The model or the data cannot be used; a signal is NaN; a block computes something
            else than its architecture says.
        MismatchError: The trace to take thresholds from has another model or signal.
        OutputError: The output exists, cannot be written or does not fit on the disk.
        MissingDependencyError: The packages of the extra `hf` are not installed.
        RankError: Another rank failed or died.
    """
    if ranks.rank == 0:
        require_free(output, overwrite)
    options = _of_rank(options, ranks)
    subject = _read_subject(model, options)
    subject = replace(subject, code=_settle_own_code(subject, options))
    known = _known_thresholds(options, subject)
    require_hf_packages("torch", "transformers", "datasets")
    with quiet_transformers(), ExitStack() as stack:
        # Beside the output: weights larger than memory may not fit in the system's temporary folder either.
        own = f"-{ranks.rank}" if ranks.rank else ""
        offloaded = ranks.place(output).absolute().with_name(f".{output.name}.weights{own}")
        stack.callback(shutil.rmtree, offloaded, ignore_errors=True)
        ranks.clear_after_death(offloaded, None if ranks.rank else output)
        hooked, check, batched = _prepare(data, options, subject, offloaded, progress, ranks)
        stack.enter_context(hooked)
        stack.enter_context(check)
        batches = batched.batches if options.part is None else batched.part(options.part)
        _require_same(ranks, subject, known, batched, batches, options)
        thresholds = known
        if thresholds is None:
            thresholds = _calibrate(options.thresholds, hooked, batched, data.batch_size, progress, ranks)
        run = _Run(subject, options.signal, thresholds, hooked, batched, batches, ranks)
        return _record(run, output, overwrite=overwrite, progress=progress)


def _of_rank(options: ProfileOptions, ranks: Ranks) -> ProfileOptions:
    """The options with the device of this rank."""
    if options.part is not None and ranks.count > 1:
        raise OptionError(
            f"--part {options.part[0]}/{options.part[1]} and torchrun both share the data out", fix="drop one of them"
        )
    return replace(options, execution=replace(options.execution, device=ranks.device(options.execution.device)))


def _require_same(
    ranks: Ranks,
    subject: Subject,
    thresholds: Thresholds | None,
    data: CalibrationData,
    batches: Sequence[Batch],
    options: ProfileOptions,
) -> None:
    """Check that the ranks run one model on the same data, and that there is something to do for each.

    Raises:
        MismatchError: They do not.
        OptionError: There are fewer batches than ranks.
    """
    ranks.require_same(
        {
            "the package": __version__,
            "the model": _identity(subject),
            "the signal": options.signal,
            "the thresholds": options.thresholds.active_ratio if thresholds is None else thresholds.values,
            "the number of calibration tokens": options.thresholds.calibration_tokens,
            "the number of datasets": len(data.sources),
            **{f"the data of {source.name}": source.sha256 for source in data.sources},
            **{f"how {source.name} is run": source.parameters for source in data.sources},
        }
    )
    if len(batches) < ranks.count:
        raise OptionError(
            f"there are only {len(batches)} batches for {ranks.count} ranks",
            fix="start fewer ranks or lower --batch-size",
        )


def _read_subject(model: str | Path, options: ProfileOptions) -> Subject:
    source = find_model(model, options.revision)
    with Checkpoint(source.directory, source.origin) as checkpoint:
        description = describe(checkpoint)
        refuse_scales(checkpoint)
        architecture = choose_architecture(description, options.architecture)
        identity = {
            "fingerprint": checkpoint.fingerprint,
            "model_type": checkpoint.model_type,
            "architecture": architecture.name,
        }
        blocks = find_blocks(checkpoint, architecture)
        refuse_scaled_blocks(checkpoint, blocks)
        return Subject(
            name=str(model),
            directory=checkpoint.directory,
            origin=checkpoint.origin,
            identity=identity,
            architecture=architecture,
            blocks=blocks,
            shapes=description.shapes,
            coverage=require_coverage(checkpoint, blocks, allow_uncovered=options.allow_uncovered),
        )


def _settle_own_code(subject: Subject, options: ProfileOptions) -> str | None:
    from neuralink_cli.models.own_code import settle_own_code

    execution = options.execution
    return settle_own_code(
        subject.directory,
        subject.architecture,
        trust=execution.trust_remote_code,
        ignore=execution.ignore_remote_code,
    )


def _identity(subject: Subject) -> Mapping[str, str]:
    """What the trace says of the model: also what ran, where that was not the only possibility."""
    return subject.identity if subject.code is None else {**subject.identity, "code": subject.code}


def _known_thresholds(options: ProfileOptions, subject: Subject) -> Thresholds | None:
    """The thresholds that need no calibration: another trace's, or 0. None if they must be calibrated."""
    if options.thresholds.active_ratio is not None:
        return None
    if options.thresholds.trace is not None:
        return _thresholds_of_trace(options.thresholds.trace, options.signal, subject)
    for block in subject.blocks:
        if block.activation not in EXACT_AT_ZERO and not split_cut(block.activation)[0]:
            raise OptionError(
                f"activation {block.activation!r} is hardly ever exactly zero, so every neuron would count as firing",
                where=subject.directory,
                fix="pass --active-ratio 0.3, or --thresholds-from TRACE",
            )
    return Thresholds((0.0,) * len(subject.blocks), None)


def _thresholds_of_trace(path: Path, signal: str, subject: Subject) -> Thresholds:
    with Trace(path) as trace:
        trace.check_content()
        info = trace.info
    if dict(info.model) != dict(_identity(subject)):
        raise MismatchError(f"was not made with the model {subject.name}", where=path)
    if info.signal != signal:
        raise MismatchError(f"has the thresholds of signal {info.signal!r}, not {signal!r}", where=path)
    for block, other in zip(subject.blocks, info.blocks, strict=False):
        if trace_block(block, other.threshold) != _routed(other, 0):
            raise MismatchError(
                f"its block {other.id!r} differs from the block of the model {subject.name}", where=path
            )
    if len(info.blocks) != len(subject.blocks):
        raise MismatchError(f"has {len(info.blocks)} blocks, but the model has {len(subject.blocks)}", where=path)
    return Thresholds(tuple(block.threshold for block in info.blocks), info.calibration)


def _prepare(
    data: CalibrationOptions,
    options: ProfileOptions,
    subject: Subject,
    offloaded: Path,
    progress: Progress,
    ranks: Ranks,
) -> tuple[HookedModel, DescriptionCheck, CalibrationData]:
    """Load the model and read the data. The first sample of each dataset is checked before the model is loaded."""
    from neuralink_cli.activations.description_check import DescriptionCheck
    from neuralink_cli.activations.hooked_blocks import hooked_blocks
    from neuralink_cli.activations.preflight import tell_needs
    from neuralink_cli.activations.recorder import HookedModel
    from neuralink_cli.models.loading import load_model
    from neuralink_cli.models.offload import MemoryLimit

    directory, task, execution = subject.directory, subject.architecture.task, options.execution
    reader: ImageReader | TextReader
    if task == "image-encoder":
        reader = ImageReader(data, directory)
    else:
        reader = TextReader(data, directory, task, trust_remote_code=execution.trust_remote_code)
    tell_needs(data, execution, options.part, directory, subject.blocks, ranks)
    with progress("loading the model", None, "B"):
        model = load_model(
            subject.directory,
            subject.architecture,
            device=execution.device,
            dtype=execution.dtype,
            limit=MemoryLimit(execution.max_memory, offloaded, ranks.memory),
            trust_remote_code=execution.trust_remote_code,
            ignore_remote_code=execution.ignore_remote_code,
        )
    blocks = hooked_blocks(model, subject.blocks, subject.shapes, subject.architecture, options.signal)
    check = DescriptionCheck(model, subject.directory, subject.blocks, subject.shapes, subject.architecture)
    return HookedModel(model, blocks), check, reader.read(model, progress)


def _calibrate(
    options: ThresholdOptions,
    hooked: HookedModel,
    data: CalibrationData,
    batch_size: int,
    progress: Progress,
    ranks: Ranks,
) -> Thresholds:
    from neuralink_cli.activations.recorder import calibrate

    ratio = options.active_ratio
    if ratio is None:
        raise ValueError("there is no active ratio to calibrate to")
    # Batches of the whole run, even if only a part is recorded: parts of one run must have the same thresholds.
    batches = data.spread_batches(options.calibration_tokens, batch_size)
    tokens = sum(batch.tokens for batch in batches)
    with ranks.progress(progress)("calibrating thresholds", tokens, "token") as advance:
        histograms = calibrate(hooked, data.spread_inputs(ranks.share(batches)), advance)
    histograms.add_up(ranks.add_up)
    return Thresholds(tuple(histograms.thresholds(ratio)), {"active_ratio": ratio, "tokens": tokens})


def _record(run: _Run, output: Path, *, overwrite: bool, progress: Progress) -> ProfileSummary:
    from neuralink_cli.activations.preflight import telling_time
    from neuralink_cli.activations.recorder import record

    subject, thresholds, data, batches, ranks = run.subject, run.thresholds, run.data, run.batches, run.ranks
    blocks = tuple(
        trace_block(block, threshold) for block, threshold in zip(subject.blocks, thresholds.values, strict=True)
    )
    header = TraceHeader(
        model=_identity(subject),
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
        recorded = ranks.collect(_Recorded(active, [spool.count(k) for k in range(len(blocks))], of_sources))
        counts = [each.rows for each in recorded]
        header = replace(header, blocks=tuple(map(_routed, blocks, map(sum, zip(*counts, strict=True)))))
        sizes = [(block.row_bytes, 0 if block.routed is None else TOKEN_BYTES) for block in blocks]
        ranks.pass_on_remarks()
        if ranks.rank:
            ranks.send_rows(spool, sizes)
            digest = ranks.tell("")
        else:
            rows = ranks.all_rows(spool, sizes, counts)
            digest = ranks.tell(_write(run, output, header, rows, overwrite=overwrite, progress=progress))
    return _summarize(header, recorded, digest, subject.coverage)


def _write(run: _Run, output: Path, header: TraceHeader, rows: Rows, *, overwrite: bool, progress: Progress) -> str:
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


def _routed(block: TraceBlock, rows: int) -> TraceBlock:
    return block if block.routed is None else replace(block, routed=rows)


def _summarize(header: TraceHeader, recorded: Sequence[_Recorded], digest: str, coverage: Coverage) -> ProfileSummary:
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
