"""Profiling: calibration data through the model into a trace. Torch is imported when a run starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli.activations.request import BlockSummary, ProfileRequest, ProfileSummary, SourceSummary, check_request
from neuralink_cli.activations.spool import Spool
from neuralink_cli.activations.threshold import EXACT_AT_ZERO
from neuralink_cli.activations.trace import Trace, TraceBlock, TraceHeader, bytes_per_token, trace_block, write_trace
from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.model_description import describe
from neuralink_cli.calibration.readers import ImageReader, TextReader
from neuralink_cli.calibration.sequences import Batch
from neuralink_cli.calibration.sources import CalibrationData
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.durable import require_free, require_space
from neuralink_cli.progress import Progress, no_progress

if TYPE_CHECKING:
    from neuralink_cli.activations.recorder import HookedModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """The model that is profiled, as its checkpoint describes it; `shapes` are those of all tensors."""

    directory: Path
    origin: Origin | None
    identity: Mapping[str, str]
    architecture: Architecture
    blocks: tuple[FFNBlock, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Thresholds:
    """The threshold of each block, and how they were found (None if they are all 0)."""

    values: tuple[float, ...]
    calibration: Mapping[str, Any] | None


def profile(request: ProfileRequest, progress: Progress = no_progress) -> ProfileSummary:
    """Record which neurons fire for every token of the calibration data, and write the trace.

    The same request gives the same bytes on the same machine. Tokens that are padding are left out, nothing else is.

    Raises:
        OptionError: Options that do not go together, or not with this model.
        InputError, UnsupportedError: The model or the data cannot be used; a signal is NaN.
        MismatchError: `thresholds_from` is of another model or signal.
        OutputError: The output exists, cannot be written or does not fit on the disk.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    check_request(request)
    require_free(request.output, request.overwrite)
    subject = _read_subject(request)
    known = _known_thresholds(request, subject)
    require_hf_packages("torch", "transformers", "datasets")
    with quiet_transformers(), ExitStack() as stack:
        # Beside the output: what has no room in memory may have none in the system's temporary folder either.
        offloaded = request.output.absolute().with_name(f".{request.output.name}.weights")
        stack.callback(shutil.rmtree, offloaded, ignore_errors=True)
        hooked, data = _prepare(request, subject, offloaded, progress)
        stack.enter_context(hooked)
        batches = data.batches if request.part is None else data.part(request.part)
        thresholds = known if known is not None else _calibrate(request, hooked, data, progress)
        return _record(request, subject, thresholds, hooked, data, batches, progress)


def _read_subject(request: ProfileRequest) -> Subject:
    source = find_model(request.model, request.revision)
    with Checkpoint(source.directory, source.origin) as checkpoint:
        description = describe(checkpoint)
        architecture = choose_architecture(
            checkpoint.model_type,
            checkpoint.directory,
            request.architecture_file,
            description if request.infer_architecture else None,
        )
        identity = {
            "fingerprint": checkpoint.fingerprint,
            "model_type": checkpoint.model_type,
            "architecture": architecture.name,
        }
        return Subject(
            directory=checkpoint.directory,
            origin=checkpoint.origin,
            identity=identity,
            architecture=architecture,
            blocks=find_blocks(checkpoint, architecture),
            shapes=description.shapes,
        )


def _known_thresholds(request: ProfileRequest, subject: Subject) -> Thresholds | None:
    """The thresholds that need no calibration: another trace's, or 0; None if they are to be calibrated."""
    if request.active_ratio is not None:
        return None
    if request.thresholds_from is not None:
        return _thresholds_of_trace(request.thresholds_from, request, subject)
    for block in subject.blocks:
        if block.activation not in EXACT_AT_ZERO:
            raise OptionError(
                f"activation {block.activation!r} is hardly ever exactly zero, so every neuron would count as firing",
                where=subject.directory,
                fix="pass --active-ratio 0.3, or --thresholds-from TRACE",
            )
    return Thresholds((0.0,) * len(subject.blocks), None)


def _thresholds_of_trace(path: Path, request: ProfileRequest, subject: Subject) -> Thresholds:
    with Trace(path) as trace:
        trace.check_content()
        info = trace.info
    if dict(info.model) != dict(subject.identity):
        raise MismatchError(f"was not made with the model {request.model}", where=path)
    if info.signal != request.signal:
        raise MismatchError(f"has the thresholds of signal {info.signal!r}, not {request.signal!r}", where=path)
    for block, other in zip(subject.blocks, info.blocks, strict=False):
        if trace_block(block, other.threshold) != _routed(other, 0):
            raise MismatchError(f"its block {other.id!r} is not that of the model {request.model}", where=path)
    if len(info.blocks) != len(subject.blocks):
        raise MismatchError(f"has {len(info.blocks)} blocks, the model {len(subject.blocks)}", where=path)
    return Thresholds(tuple(block.threshold for block in info.blocks), info.calibration)


def _prepare(
    request: ProfileRequest, subject: Subject, offloaded: Path, progress: Progress
) -> tuple[HookedModel, CalibrationData]:
    """Load the model and read the data, looking at the first sample of each dataset before the model is loaded."""
    from neuralink_cli.activations.hooked_blocks import hooked_blocks
    from neuralink_cli.activations.preflight import tell_needs
    from neuralink_cli.activations.recorder import HookedModel
    from neuralink_cli.models.loading import load_model
    from neuralink_cli.models.offload import MemoryLimit

    images = subject.architecture.task == "image-encoder"
    directory, task = subject.directory, subject.architecture.task
    reader = ImageReader(request, directory) if images else TextReader(request, directory, task)
    tell_needs(request, directory, subject.blocks)
    with progress("loading the model", None, "B"):
        model = load_model(
            subject.directory,
            subject.architecture,
            device=request.device,
            dtype=request.dtype,
            limit=MemoryLimit(request.max_memory, offloaded),
            trust_remote_code=request.trust_remote_code,
        )
    blocks = hooked_blocks(model, subject.blocks, subject.shapes, subject.architecture, request.signal)
    return HookedModel(model, blocks), reader.read(model, progress)


def _calibrate(request: ProfileRequest, hooked: HookedModel, data: CalibrationData, progress: Progress) -> Thresholds:
    from neuralink_cli.activations.recorder import calibrate

    assert request.active_ratio is not None
    # Of the whole run, whatever part of it is recorded: parts of one run must agree.
    batches = data.first_batches(request.calibration_tokens)
    tokens = sum(batch.tokens for batch in batches)
    with progress("calibrating thresholds", tokens, "token") as advance:
        values = calibrate(hooked, data.inputs(batches), request.active_ratio, advance)
    return Thresholds(tuple(values), {"active_ratio": request.active_ratio, "tokens": tokens})


def _record(
    request: ProfileRequest,
    subject: Subject,
    thresholds: Thresholds,
    hooked: HookedModel,
    data: CalibrationData,
    batches: Sequence[Batch],
    progress: Progress,
) -> ProfileSummary:
    from neuralink_cli.activations.preflight import telling_time
    from neuralink_cli.activations.recorder import record

    blocks = tuple(
        trace_block(block, threshold) for block, threshold in zip(subject.blocks, thresholds.values, strict=True)
    )
    header = TraceHeader(
        model=subject.identity,
        origin=subject.origin,
        signal=request.signal,
        calibration=thresholds.calibration,
        blocks=blocks,
        sources=data.trace_sources(batches),
    )
    row_bytes = [block.row_bytes for block in blocks]
    # Once in the spool and once in the trace.
    require_space(request.output, round(2 * header.tokens * bytes_per_token(subject.blocks)))
    with Spool(request.output, row_bytes) as spool:
        with progress("recording", header.tokens, "token") as advance:
            timed = telling_time(advance, header.tokens)
            active = record(hooked, thresholds.values, data.inputs(batches), spool, timed)
        header = replace(header, blocks=tuple(_routed(block, spool.count(k)) for k, block in enumerate(blocks)))
        index_of = {block.id: index for index, block in enumerate(blocks)}
        lengths = data.sequence_lengths(batches)
        rows = sum(spool.count(index) * size for index, size in enumerate(row_bytes))
        with progress("writing", rows + lengths.nbytes, "B") as advance:
            digest = write_trace(
                request.output,
                header,
                lengths,
                lambda block: spool.rows(index_of[block]),
                lambda block: spool.tokens(index_of[block]),
                overwrite=request.overwrite,
                progress=advance,
            )
    return _summarize(header, active, digest)


def _routed(block: TraceBlock, rows: int) -> TraceBlock:
    return block if block.routed is None else replace(block, routed=rows)


def _summarize(header: TraceHeader, active: Sequence[int], digest: str) -> ProfileSummary:
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
        sources=tuple(SourceSummary(source.name, source.sequences, source.tokens) for source in header.sources),
    )
