"""Checkpoint and placement in, layout out: plan, check everything, then stream."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import FFNBlock, moved_pieces
from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice, choose_architecture
from neuralink_cli.architectures.coverage import Coverage, require_coverage
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.model_description import describe
from neuralink_cli.architectures.scales import refuse_scaled_blocks, refuse_scales
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.companions import LeftOut
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.devices.device import DeviceModel, recorded_device
from neuralink_cli.errors import MismatchError, OptionError, OutputError
from neuralink_cli.files.bulk_io import PAGE
from neuralink_cli.files.durable import (
    leftover_bytes,
    new_directory,
    require_replaceable,
    require_space,
    write_file,
)
from neuralink_cli.files.estimate import Estimate, Pass, estimate
from neuralink_cli.files.journal import Journal, open_journal
from neuralink_cli.files.weight_formats import NEAREST, ROUNDINGS, SOURCE, parse_weight_formats
from neuralink_cli.layout.bundled_writer import write_bundled
from neuralink_cli.layout.companions import (
    companions_to_copy,
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
from neuralink_cli.layout.permuting import write_permuted
from neuralink_cli.layout.plan import BundledPlan, plan_bundled
from neuralink_cli.layout.replaced import Unreplaced
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, Placement
from neuralink_cli.progress import Progress, no_progress

logger = logging.getLogger(__name__)

MAX_ALIGNMENT = 1 << 24
# A generous allowance for index, card and file system overhead beside the weights and companions.
_SPARE_BYTES = 4 << 20


@dataclass(frozen=True)
class RelayoutOptions:
    """Options of the layout; `alignment` is in bytes, a power of two.

    Attributes:
        all_files: Take along what is left out otherwise: other copies of the weights, hidden files and the like.
        weights: The format to round FFN weights to, `FORMAT` or `ROLE=FORMAT,...` as in `parse_weight_formats`.
        rounding: How the scales of rounded weights are found: `nearest` or `search`.
    """

    layout: str = BUNDLED
    resident: str = "none"
    alignment: int = 4096
    all_files: bool = False
    weights: str = SOURCE
    rounding: str = NEAREST

    @property
    def formats(self) -> dict[str, str]:
        """The format of every role.

        Raises:
            OptionError: `weights` is no format, nor a list of them.
        """
        return parse_weight_formats(self.weights, "--weights")


@dataclass(frozen=True)
class RelayoutPlan:
    """What will be written: `bundled` is the plan of the flash file, None for a permuted layout.

    Attributes:
        companions: The files copied beside the weights, by their name in the source.
        left_out: The files of the source that are not in the layout.
    """

    source: Path
    options: RelayoutOptions
    blocks: tuple[FFNBlock, ...]
    bundled: BundledPlan | None
    weight_bytes: int
    companions: tuple[str, ...]
    companion_bytes: int
    left_out: tuple[LeftOut, ...]
    peak_block_bytes: int

    @property
    def total_bytes(self) -> int:
        """Size of the weights and the files copied beside them."""
        return self.weight_bytes + self.companion_bytes


@dataclass(frozen=True)
class RelayoutSummary:
    """What was written, or would be.

    Attributes:
        written: False for a dry run.
        origin: The hub model, if the checkpoint is one.
        peak_block_bytes: Bytes of the bundles of the largest block.
        companions: How many files were copied beside the weights.
        left_out: How many files of the checkpoint's folder are not in the layout; `left_out_bytes` is their size.
        estimate: Time, memory and disk that the run was expected to take.
    """

    output: str
    written: bool
    origin: Origin | None
    layout: str
    resident: str
    weights: str
    alignment: int
    blocks: int
    neurons: int
    weight_bytes: int
    total_bytes: int
    peak_block_bytes: int
    companions: int
    left_out: int
    left_out_bytes: int
    estimate: Estimate
    coverage: Coverage


def relayout(
    model: str | Path,
    placement: Path,
    output: Path,
    options: RelayoutOptions = RelayoutOptions(),
    *,
    revision: str | None = None,
    architecture: ArchitectureChoice = BUILT_IN,
    allow_uncovered: bool = False,
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
        dry_run: Only check and plan.
        resume: Continue a killed run with the same inputs and options; if this run fails, keep what is written.

    Raises:
        OptionError, MismatchError, InputError, UnsupportedError: As `plan_relayout`.
        OutputError: As `check_output`.
    """
    with Placement(placement) as opened:
        # After the placement is checked: a model may take long to fetch.
        source = find_model(model, revision, all_files=options.all_files)
        with Unreplaced(source.directory), Checkpoint(source.directory, source.origin) as checkpoint:
            refuse_scales(checkpoint)
            found = choose_architecture(describe(checkpoint), architecture)
            blocks = find_blocks(checkpoint, found)
            refuse_scaled_blocks(checkpoint, blocks)
            coverage = require_coverage(checkpoint, blocks, allow_uncovered=allow_uncovered)
            plan = plan_relayout(checkpoint, found, opened, options)
            check_output(plan, output, overwrite)
            expected = estimate_relayout(plan, checkpoint, output)
            logger.info("%s", expected)
            if plan.left_out:
                logger.info("%s", remark_on_left_out(plan.left_out))
            if not dry_run:
                with progress("relayout", plan.total_bytes, "B") as advance:
                    write_layout(plan, checkpoint, opened, output, overwrite=overwrite, resume=resume, progress=advance)
    return RelayoutSummary(
        output=str(output),
        written=not dry_run,
        origin=source.origin,
        layout=options.layout,
        resident=options.resident,
        weights=options.weights,
        alignment=options.alignment,
        blocks=len(plan.blocks),
        neurons=sum(block.neurons for block in plan.blocks),
        weight_bytes=plan.weight_bytes,
        total_bytes=plan.total_bytes,
        peak_block_bytes=plan.peak_block_bytes,
        companions=len(plan.companions),
        left_out=len(plan.left_out),
        left_out_bytes=sum(file.nbytes for file in plan.left_out),
        estimate=expected,
        coverage=coverage,
    )


def plan_relayout(
    checkpoint: Checkpoint, architecture: Architecture, placement: Placement, options: RelayoutOptions
) -> RelayoutPlan:
    """Check that checkpoint and placement belong together and decide everything that will be written.

    Raises:
        OptionError: An alignment that is not a power of two, or `resident` with a permuted layout.
        MismatchError: The placement was made for another checkpoint.
        InputError, UnsupportedError: The checkpoint's tensors do not make FFN blocks.
    """
    _check_options(options)
    blocks = find_blocks(checkpoint, architecture)
    check_placement(checkpoint, blocks, placement)
    beside = companions_to_copy(checkpoint, all_files=options.all_files)
    bundled = None
    weight_bytes = sum(file.size for file in checkpoint.files)
    if options.layout == BUNDLED:
        placed = {block.id: block for block in placement.info.blocks}
        bundled = plan_bundled(
            checkpoint,
            blocks,
            placed,
            device=_device(placement),
            ordering_sequences=placement.ordering_sequences.shape[0],
            resident=options.resident,
            alignment=options.alignment,
            weights=options.formats,
            rounding=options.rounding,
        )
        weight_bytes = bundled.file_bytes
        _tell_of_other_bundles(bundled, placement)
    return RelayoutPlan(
        source=checkpoint.directory,
        options=options,
        blocks=blocks,
        bundled=bundled,
        weight_bytes=weight_bytes,
        companions=tuple(file.name for file in beside.companions),
        companion_bytes=sum(file.nbytes for file in beside.companions),
        left_out=beside.left_out,
        peak_block_bytes=max(block.neurons * block.bundle_bytes for block in blocks),
    )


def _device(placement: Placement) -> DeviceModel | None:
    """The device that the order was made for; None if the placement does not say."""
    record = placement.info.parameters.get("device")
    return None if record is None else recorded_device(record, placement.path)


def _tell_of_other_bundles(plan: BundledPlan, placement: Placement) -> None:
    made_for = {block.id: block.bundle_bytes for block in placement.info.blocks}
    differing = [block for block in plan.blocks if block.stride != made_for[block.id]]
    if differing:
        first = differing[0]
        logger.info(
            "the order was made for bundles of %s bytes, these have %s (first in %s): `cluster%s` makes it for them",
            f"{made_for[first.id]:,}",
            f"{first.stride:,}",
            first.id,
            " --resident gate" if plan.resident == "gate" else "",
        )


def check_placement(checkpoint: Checkpoint, blocks: Sequence[FFNBlock], placement: Placement) -> None:
    """Check that a placement was made for a checkpoint.

    Raises:
        MismatchError: Fingerprints, blocks or their sizes differ.
    """
    fingerprint = placement.info.model["fingerprint"]
    if fingerprint != checkpoint.fingerprint:
        raise MismatchError(
            f"was made for the model with fingerprint {fingerprint[:12]}, "
            f"but {checkpoint.directory} has {checkpoint.fingerprint[:12]}",
            where=placement.path,
            fix="profile and cluster this checkpoint",
        )
    expected = {block.id: block.neurons for block in blocks}
    found = {block.id: block.neurons for block in placement.info.blocks}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise MismatchError(f"does not fit the checkpoint's blocks (first at {differing})", where=placement.path)


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
    require_space(output, plan.total_bytes + spare - leftover_bytes(output))


def write_layout(
    plan: RelayoutPlan,
    checkpoint: Checkpoint,
    placement: Placement,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the planned layout; it appears at `output` when it is complete.

    Args:
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
            _write_card(directory, checkpoint, placement, BUNDLED)
            document = flash_document(plan.bundled, placement, sha256, digests, companions, checkpoint.origin)
            write_index(directory / FLASH_INDEX, FLASH_SCHEMA, document)
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


def _check_options(options: RelayoutOptions) -> None:
    if options.alignment < 1 or options.alignment > MAX_ALIGNMENT or options.alignment & (options.alignment - 1):
        raise OptionError(f"--alignment {options.alignment} is not a power of two up to {MAX_ALIGNMENT}")
    if options.layout == PERMUTED and options.resident != "none":
        raise OptionError("--resident needs --layout bundled: a permuted layout keeps every tensor where it was")
    rounded = set(options.formats.values()) != {SOURCE}
    if options.layout == PERMUTED and rounded:
        raise OptionError("--weights needs --layout bundled: a permuted layout keeps every tensor as it was")
    if options.rounding not in ROUNDINGS:
        raise OptionError(f"--rounding {options.rounding!r} is not one of {', '.join(ROUNDINGS)}")


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
    document = permuted_document(moved, placement, files, verbatim, companions, checkpoint.origin)
    write_index(directory / PERMUTED_INDEX, PERMUTED_SCHEMA, document)


def _write_card(directory: Path, checkpoint: Checkpoint, placement: Placement, layout: str) -> None:
    write_file(directory / MODEL_CARD, model_card(checkpoint, layout, placement).encode())


def estimate_relayout(plan: RelayoutPlan, checkpoint: Checkpoint, output: Path) -> Estimate:
    """Estimate what `write_layout` will take."""
    work = Pass(checkpoint.files, plan.total_bytes, other_read=plan.companion_bytes)
    return estimate([work], plan.peak_block_bytes, output)
