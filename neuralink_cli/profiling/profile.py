"""Profiling: runs calibration data through the model and writes a trace. Torch is imported when a run starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from neuralink_cli import __version__
from neuralink_cli.activations.options import (
    ProfileOptions,
    ProfileSummary,
    ThresholdOptions,
)
from neuralink_cli.activations.threshold import EXACT_AT_ZERO
from neuralink_cli.activations.trace import (
    Trace,
    trace_block,
)
from neuralink_cli.architectures.activation_names import split_cut, split_most
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.calibration.readers import ImageReader, TextReader
from neuralink_cli.calibration.sequences import Batch
from neuralink_cli.calibration.sources import CalibrationData
from neuralink_cli.errors import MismatchError, OptionError
from neuralink_cli.files.stage_file import require_stage_output
from neuralink_cli.models.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.profiling.ranks import ALONE, Ranks
from neuralink_cli.profiling.recording import Run, Thresholds, record_trace, routed
from neuralink_cli.profiling.subject import Subject, read_subject
from neuralink_cli.progress import Progress, no_progress

if TYPE_CHECKING:
    from neuralink_cli.profiling.description_check import DescriptionCheck
    from neuralink_cli.profiling.recorder import HookedModel


logger = logging.getLogger(__name__)


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
        WorkerError: Another rank failed or died.
    """
    if ranks.rank == 0:
        require_stage_output(output, overwrite, inputs=[*map(Path, data.datasets), options.thresholds.trace])
    options = _of_rank(options, ranks)
    subject = read_subject(model, options)
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
        run = Run(subject, options.signal, thresholds, hooked, batched, batches, ranks)
        return record_trace(run, output, overwrite=overwrite, progress=progress)


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
            "the model": subject.stated_identity,
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
    if dict(info.model) != dict(subject.stated_identity):
        raise MismatchError(f"was not made with the model {subject.name}", where=path)
    if info.signal != signal:
        raise MismatchError(f"has the thresholds of signal {info.signal!r}, not {signal!r}", where=path)
    for block, other in zip(subject.blocks, info.blocks, strict=False):
        if trace_block(block, other.threshold) != routed(other, 0):
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
    from neuralink_cli.models.loading import load_model
    from neuralink_cli.models.offload import MemoryLimit
    from neuralink_cli.profiling.description_check import DescriptionCheck
    from neuralink_cli.profiling.hooked_blocks import hooked_blocks
    from neuralink_cli.profiling.preflight import tell_needs
    from neuralink_cli.profiling.recorder import HookedModel

    directory, task, execution = subject.directory, subject.architecture.task, options.execution
    reader: ImageReader | TextReader
    if task == "image-encoder":
        reader = ImageReader(data, directory)
    else:
        reader = TextReader(data, directory, task, trust_remote_code=execution.trust_remote_code)
    calibrated = options.thresholds.active_ratio is not None
    tell_needs(data, execution, options.part, directory, subject.blocks, ranks, calibrated=calibrated)
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
    from neuralink_cli.profiling.recorder import calibrate

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
