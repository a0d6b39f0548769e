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

from neuralink_cli.activations.options import (
    BlockSummary,
    ProfileOptions,
    ProfileSummary,
    SourceSummary,
    ThresholdOptions,
)
from neuralink_cli.activations.spool import Spool
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
from neuralink_cli.architectures.activation_names import split_cut, split_most
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
from neuralink_cli.calibration.sources import CalibrationData
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
    """Everything that is known before recording starts."""

    subject: Subject
    signal: str
    thresholds: Thresholds
    hooked: HookedModel
    data: CalibrationData
    batches: Sequence[Batch]


def profile(
    model: str | Path,
    output: Path,
    data: CalibrationOptions,
    options: ProfileOptions = ProfileOptions(),
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ProfileSummary:
    """Record which FFN neurons fire for every token of the calibration data, and write the trace to `output`.

    The same arguments give the same bytes on the same machine. Only padding is left out of the trace.

    Args:
        model: A checkpoint directory; a string may also be a hub id, see `find_model`.

    Raises:
        OptionError: The options do not go together, or not with this model.
        InputError, UnsupportedError: The model or the data cannot be used; a signal is NaN; a block computes something
            else than its architecture says.
        MismatchError: The trace to take thresholds from has another model or signal.
        OutputError: The output exists, cannot be written or does not fit on the disk.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    require_free(output, overwrite)
    subject = _read_subject(model, options)
    subject = replace(subject, code=_settle_own_code(subject, options))
    known = _known_thresholds(options, subject)
    require_hf_packages("torch", "transformers", "datasets")
    with quiet_transformers(), ExitStack() as stack:
        # Beside the output: weights larger than memory may not fit in the system's temporary folder either.
        offloaded = output.absolute().with_name(f".{output.name}.weights")
        stack.callback(shutil.rmtree, offloaded, ignore_errors=True)
        hooked, check, batched = _prepare(data, options, subject, offloaded, progress)
        stack.enter_context(hooked)
        stack.enter_context(check)
        batches = batched.batches if options.part is None else batched.part(options.part)
        thresholds = known
        if thresholds is None:
            thresholds = _calibrate(options.thresholds, hooked, batched, data.batch_size, progress)
        run = _Run(subject, options.signal, thresholds, hooked, batched, batches)
        return _record(run, output, overwrite=overwrite, progress=progress)


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
        if split_most(block.activation)[1] not in EXACT_AT_ZERO and not split_cut(block.activation)[0]:
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
    data: CalibrationOptions, options: ProfileOptions, subject: Subject, offloaded: Path, progress: Progress
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
    tell_needs(data, execution, options.part, directory, subject.blocks)
    with progress("loading the model", None, "B"):
        model = load_model(
            subject.directory,
            subject.architecture,
            device=execution.device,
            dtype=execution.dtype,
            limit=MemoryLimit(execution.max_memory, offloaded),
            trust_remote_code=execution.trust_remote_code,
            ignore_remote_code=execution.ignore_remote_code,
        )
    blocks = hooked_blocks(model, subject.blocks, subject.shapes, subject.architecture, options.signal)
    check = DescriptionCheck(model, subject.directory, subject.blocks, subject.shapes, subject.architecture)
    return HookedModel(model, blocks), check, reader.read(model, progress)


def _calibrate(
    options: ThresholdOptions, hooked: HookedModel, data: CalibrationData, batch_size: int, progress: Progress
) -> Thresholds:
    from neuralink_cli.activations.recorder import calibrate

    ratio = options.active_ratio
    if ratio is None:
        raise ValueError("there is no active ratio to calibrate to")
    # Batches of the whole run, even if only a part is recorded: parts of one run must have the same thresholds.
    batches = data.spread_batches(options.calibration_tokens, batch_size)
    tokens = sum(batch.tokens for batch in batches)
    with progress("calibrating thresholds", tokens, "token") as advance:
        values = calibrate(hooked, data.spread_inputs(batches), ratio, advance)
    return Thresholds(tuple(values), {"active_ratio": ratio, "tokens": tokens})


def _record(run: _Run, output: Path, *, overwrite: bool, progress: Progress) -> ProfileSummary:
    from neuralink_cli.activations.preflight import telling_time
    from neuralink_cli.activations.recorder import record

    subject, thresholds, data, batches = run.subject, run.thresholds, run.data, run.batches
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
    # Written once to the spool and once to the trace.
    require_space(output, round(2 * header.tokens * bytes_per_token(subject.blocks)))
    with Spool(output, row_bytes) as spool:
        with progress("recording", header.tokens, "token") as advance:
            timed = telling_time(advance, header.tokens)
            sources = [batch.source for batch in batches]
            active, shares = record(run.hooked, thresholds.values, data.inputs(batches), spool, timed, sources)
        header = replace(header, blocks=tuple(_routed(block, spool.count(k)) for k, block in enumerate(blocks)))
        index_of = {block.id: index for index, block in enumerate(blocks)}
        lengths, digests = data.sequence_lengths(batches), data.sequence_digests(batches)
        carried = data.sequence_carried(batches)
        rows = sum(spool.count(index) * size for index, size in enumerate(row_bytes))
        with progress("writing", rows + lengths.nbytes + digests.nbytes + carried.nbytes, "B") as advance:
            digest = write_trace(
                output,
                header,
                lengths,
                digests,
                lambda block: spool.rows(index_of[block]),
                lambda block: spool.tokens(index_of[block]),
                sequence_carried=carried,
                overwrite=overwrite,
                progress=advance,
            )
    return _summarize(header, active, shares, digest, subject.coverage)


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


def _summarize(
    header: TraceHeader, active: Sequence[int], shares: Sequence[float], digest: str, coverage: Coverage
) -> ProfileSummary:
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
