"""Checkpoint and placement in, layout out: plan, check everything, then stream."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.blocks import moved_pieces
from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice
from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.architectures.workable_blocks import find_workable_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import OutputError
from neuralink_cli.files.bulk_io import PAGE
from neuralink_cli.files.durable import (
    leftover_bytes,
    new_directory,
    require_replaceable,
    require_space,
    write_file,
)
from neuralink_cli.files.free_memory import remark_if_short
from neuralink_cli.layout.companions import (
    copy_files,
    model_card,
    names_of_originals,
    remark_on_left_out,
    stored_name,
    write_kept_files,
)
from neuralink_cli.layout.index import (
    FLASH_SCHEMA,
    PERMUTED_SCHEMA,
    flash_document,
    is_layout,
    permuted_document,
    write_index,
)
from neuralink_cli.layout.names import (
    BUNDLED,
    FLASH_FILE,
    MODEL_CARD,
    PERMUTED,
)
from neuralink_cli.layout.plan import BundledPlan, RelayoutOptions, RelayoutPlan
from neuralink_cli.layout.recall import MeasuredRecall, MeasureRecall, decided_by_rounded_rows, require_measurable
from neuralink_cli.layout.replaced import Unreplaced
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, Placement
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.rewriting.bundled_writer import write_bundled
from neuralink_cli.rewriting.held_memory import record_bytes
from neuralink_cli.rewriting.permuting import write_permuted
from neuralink_cli.rewriting.planning import plan_relayout
from neuralink_cli.streaming.estimate import Estimate, Pass, estimate
from neuralink_cli.streaming.journal import Journal, open_journal

logger = logging.getLogger(__name__)

# A generous allowance for card and file system overhead beside the files.
_SPARE_BYTES = 4 << 20


@dataclass(frozen=True)
class RelayoutSummary:
    """What was written, or would be.

    Attributes:
        written: False for a dry run.
        origin: The hub model, if the checkpoint is one.
        peak_block_bytes: The most bytes of weights that are in memory as a whole, of a block at a time.
        companions: How many files were copied beside the weights.
        left_out: How many files of the checkpoint's folder are not in the layout; `left_out_bytes` is their size.
        gate_recall: What rounding the rows that decide firing does; None if it was not measured.
        estimate: Time, memory and disk that the run was expected to take.
    """

    output: str
    written: bool
    origin: Origin | None
    layout: str
    resident: str
    weights: str
    dense_weights: str
    alignment: int
    blocks: int
    neurons: int
    weight_bytes: int
    total_bytes: int
    peak_block_bytes: int
    companions: int
    left_out: int
    left_out_bytes: int
    gate_recall: MeasuredRecall | None
    estimate: Estimate
    coverage: Coverage


def relayout(
    model: str | Path,
    placement: Path,
    output: Path,
    options: RelayoutOptions = RelayoutOptions(),  # noqa: B008 - it is frozen
    *,
    revision: str | None = None,
    architecture: ArchitectureChoice = BUILT_IN,
    allow_uncovered: bool = False,
    measure_recall: MeasureRecall | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> RelayoutSummary:
    """Write a checkpoint in the order of a placement. The output is complete or does not exist.

    Everything is checked, and the estimate logged, before the first byte is written.

    Args:
        model: A checkpoint directory; a string may also be a hub id, see `find_model`.
        allow_uncovered: Go on though there are FFNs that no block covers.
        measure_recall: Runs the source before anything is written, for the index to state what rounding the rows that
            decide firing does; a dry run only asks what that takes.
        dry_run: Only check and plan.
        resume: Continue a killed run with the same inputs and options; if this run fails, keep what is written.

    Raises:
        OptionError, MismatchError, InputError, UnsupportedError: As `plan_relayout`, and `require_measurable` if recall
            is to be measured.
        OutputError: As `check_output`.
    """
    with Placement(placement) as opened:
        # After the placement is checked: a model may take long to fetch.
        source = find_model(model, revision, all_files=options.all_files)
        with Unreplaced(source.directory), Checkpoint(source.directory, source.origin) as checkpoint:
            found = find_workable_blocks(checkpoint, architecture, allow_uncovered=allow_uncovered)
            plan = plan_relayout(checkpoint, found.blocks, opened, options)
            check_output(plan, output, overwrite)
            if measure_recall is not None:
                require_measurable(plan.bundled, opened.info, found.architecture, "--recall-text")
            elif plan.bundled is not None and decided_by_rounded_rows(plan.bundled, opened):
                logger.info(
                    "rounded rows decide which neurons are above calibrated thresholds: --recall-text FILE measures "
                    "what they miss"
                )
            expected = estimate_relayout(plan, checkpoint, output, measure_recall)
            logger.info("%s", expected)
            remark_if_short(expected.memory_bytes)
            if plan.left_out:
                logger.info("%s", remark_on_left_out(plan.left_out))
            recall = None
            if not dry_run:
                if measure_recall is not None and plan.bundled is not None:
                    recall = measure_recall.measure(plan.bundled, checkpoint, opened, found.architecture)
                with progress("relayout", plan.total_bytes, "B") as advance:
                    write_layout(
                        plan,
                        checkpoint,
                        opened,
                        output,
                        recall=recall,
                        overwrite=overwrite,
                        resume=resume,
                        progress=advance,
                    )
    return RelayoutSummary(
        output=str(output),
        written=not dry_run,
        origin=source.origin,
        layout=options.layout,
        resident=options.resident,
        weights=options.weights,
        dense_weights=options.dense_format,
        alignment=options.alignment,
        blocks=len(plan.blocks),
        neurons=sum(block.neurons for block in plan.blocks),
        weight_bytes=plan.weight_bytes,
        total_bytes=plan.total_bytes,
        peak_block_bytes=plan.held_bytes,
        companions=len(plan.companions),
        left_out=len(plan.left_out),
        left_out_bytes=sum(file.nbytes for file in plan.left_out),
        gate_recall=recall,
        estimate=expected,
        coverage=found.coverage,
    )


def check_output(plan: RelayoutPlan, output: Path, overwrite: bool) -> None:
    """Check that the planned layout may be written to `output` and fits there.

    Raises:
        OutputError: The output exists (without `overwrite`), is the model itself, or does not fit on the disk.
    """
    require_replaceable(output, overwrite, is_layout)
    if output.exists() and output.samefile(plan.source):
        raise OutputError("is the model itself", where=output, fix="choose another output")
    # A file takes whole pages.
    spare = _SPARE_BYTES + PAGE * len(plan.companions)
    require_space(output, plan.total_bytes + plan.own_bytes + spare - leftover_bytes(output))


def write_layout(
    plan: RelayoutPlan,
    checkpoint: Checkpoint,
    placement: Placement,
    output: Path,
    *,
    recall: MeasuredRecall | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the planned layout; it appears at `output` when it is complete.

    Args:
        recall: For the index.
        resume: Continue a killed run of the same layout; if this run fails, keep what is written.

    Raises:
        OutputError: The output exists (without `overwrite`), or does not fit on the disk.
    """
    check_output(plan, output, overwrite)
    with (
        new_directory(output, overwrite=overwrite, replaceable=is_layout, keep=resume) as directory,
        open_journal(directory, _run(plan, checkpoint, placement), resume=resume) as journal,
    ):
        names = {name: stored_name(name) for name in plan.companions}
        companions = copy_files(names, checkpoint.directory, directory, progress)
        if plan.bundled is not None:
            sha256 = write_bundled(
                directory / FLASH_FILE,
                plan.bundled,
                checkpoint,
                placement.blocks,
                placement.ordering_sequences,
                progress,
                journal,
            )
            digests = small_digests(plan.bundled, checkpoint, placement)
            _write_card(directory, checkpoint, placement, BUNDLED, recall)
            write_index(
                directory / FLASH_INDEX,
                FLASH_SCHEMA,
                flash_document(plan.bundled, placement, sha256, digests, companions, checkpoint.origin, recall),
            )
        else:
            _write_permuted_layout(plan, checkpoint, placement, directory, companions, progress, journal)
        journal.remove()


def _run(plan: RelayoutPlan, checkpoint: Checkpoint, placement: Placement) -> dict[str, Any]:
    """Everything that the bytes of the weight files depend on."""
    header = b"" if plan.bundled is None else plan.bundled.header.prelude
    return {
        "options": asdict(plan.options),
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "placement_sha256": placement.content_sha256,
        "fingerprint": checkpoint.fingerprint,
        # The fingerprint only samples the weights.
        "source": [[file.path.name, file.size, file.path.stat().st_mtime_ns] for file in checkpoint.files],
    }


def small_digests(plan: BundledPlan, checkpoint: Checkpoint, placement: Placement) -> dict[str, str]:
    """SHA-256 of the small tensors that a quick verification checks: order, frequency and stored source bytes."""
    content: dict[str, bytes] = {ORDERING_SEQUENCES: placement.ordering_sequences.tobytes()}
    for block in plan.blocks:
        content[block.order.tensor] = placement.blocks[block.id].order.tobytes()
        content[block.frequency.tensor] = placement.blocks[block.id].frequency.tobytes()
    preludes = {file.path.name: file.header.prelude for file in checkpoint.files}
    for source in plan.sources:
        stored = preludes.get(source.name)
        content[source.stored.tensor] = stored or checkpoint.read_beside(source.name)
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def _write_permuted_layout(
    plan: RelayoutPlan,
    checkpoint: Checkpoint,
    placement: Placement,
    directory: Path,
    companions: list[dict[str, Any]],
    progress: Callable[[int], object] | None,
    journal: Journal,
) -> None:
    moved = moved_pieces(checkpoint, plan.blocks)
    digests = write_permuted(directory, checkpoint, moved, placement.blocks, progress, journal)
    companions = [*companions, *write_kept_files(directory, checkpoint, placement)]
    _write_card(directory, checkpoint, placement, PERMUTED)
    files = [
        {"name": file.path.name, "bytes": file.size, "sha256": digests[file.path.name]} for file in checkpoint.files
    ]
    verbatim = names_of_originals(companions)
    write_index(
        directory / PERMUTED_INDEX,
        PERMUTED_SCHEMA,
        permuted_document(moved, placement, files, verbatim, companions, checkpoint.origin),
    )


def _write_card(
    directory: Path,
    checkpoint: Checkpoint,
    placement: Placement,
    layout: str,
    recall: MeasuredRecall | None = None,
) -> None:
    write_file(directory / MODEL_CARD, model_card(checkpoint, layout, placement, recall).encode())


def estimate_relayout(
    plan: RelayoutPlan, checkpoint: Checkpoint, output: Path, measure_recall: MeasureRecall | None = None
) -> Estimate:
    """Estimate what `write_layout` will take, and the memory of measuring recall before it."""
    running = 0
    if measure_recall is not None and plan.bundled is not None:
        # First, as what it loads to run the model stays in memory.
        running = measure_recall.memory_bytes(plan.bundled, checkpoint)
    writing = estimate([relayout_pass(plan, checkpoint)], held_by_plan(plan), output)
    return replace(writing, memory_bytes=max(writing.memory_bytes, running))


def held_by_plan(plan: RelayoutPlan) -> int:
    """Bytes that `write_layout` holds beside what waits to be worked on or to be written."""
    return plan.held_bytes + (0 if plan.bundled is None else record_bytes(len(plan.blocks)))


def relayout_pass(plan: RelayoutPlan, checkpoint: Checkpoint) -> Pass:
    """What `write_layout` reads and writes."""
    return writing_pass(checkpoint, plan.bundled, plan.total_bytes, plan.companion_bytes)


def writing_pass(checkpoint: Checkpoint, bundled: BundledPlan | None, written: int, companions: int) -> Pass:
    """What writing a layout reads and writes.

    Args:
        bundled: The plan of its flash file; None for a permuted layout, whose files are made one by one.
        written: Bytes of the layout.
        companions: Bytes of the files that are copied.
    """
    longest = None if bundled is not None else max(file.size for file in checkpoint.files)
    return Pass(checkpoint.files, written, other_read=companions, longest=longest)
