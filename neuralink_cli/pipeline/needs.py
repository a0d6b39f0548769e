"""What the stages of a build are going to take, as far as it is known before they run."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.clustering.preflight import cluster_needs, worker_needs
from neuralink_cli.evaluation.forward_check import output_bytes
from neuralink_cli.evaluation.recall_text import recall_bytes
from neuralink_cli.layout.companions import companions_to_copy
from neuralink_cli.layout.names import BUNDLED
from neuralink_cli.pipeline.inputs import ModelInput
from neuralink_cli.pipeline.options import BuildOptions
from neuralink_cli.placement.held_out import split_tokens
from neuralink_cli.placement.placement import ORIGINAL, PlacementBlock
from neuralink_cli.rewriting.held_memory import held_while_writing, record_bytes
from neuralink_cli.rewriting.planning import check_options, plan_bundled
from neuralink_cli.rewriting.relayout import writing_pass
from neuralink_cli.streaming.estimate import Estimate, Needs, estimate


def model_blocks(model: ModelInput, options: BuildOptions) -> tuple[FFNBlock, ...]:
    """The FFN blocks of the model.

    Raises:
        InputError, UnsupportedError: As `find_blocks`.
    """
    with Checkpoint(model.directory, model.origin) as checkpoint:
        return find_blocks(checkpoint, choose_architecture(describe(checkpoint), options.profile.architecture))


def layout_needs(model: ModelInput, options: BuildOptions, output: Path) -> Estimate:
    """What writing one layout takes, and measuring recall before: all orders take the same, so none has to be known.

    Args:
        output: The folder of the build; a sample is written beside it if the model is so large that it takes time.

    Raises:
        InputError, UnsupportedError, OptionError: The model cannot be laid out with these options.
    """
    relayout = options.relayout
    check_options(relayout)
    with Checkpoint(model.directory, model.origin) as checkpoint:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint), options.profile.architecture))
        beside = sum(file.nbytes for file in companions_to_copy(checkpoint, all_files=relayout.all_files).companions)
        weights = sum(file.size for file in checkpoint.files)
        plan, running = None, 0
        if relayout.layout == BUNDLED:
            plan = plan_bundled(
                checkpoint,
                blocks,
                {block.id: _unordered(block) for block in blocks},
                resident=relayout.resident,
                alignment=relayout.alignment,
                weights=relayout.formats,
                rounding=relayout.rounding,
                dense_weights=relayout.dense_format,
            )
            weights = plan.file_bytes
            if options.recall_text is not None:
                running = recall_bytes(plan, checkpoint)
        held = held_while_writing(checkpoint, blocks, plan) + (0 if plan is None else record_bytes(len(blocks)))
        writing = estimate([writing_pass(checkpoint, plan, weights + beside, beside)], held, output)
        return replace(writing, memory_bytes=max(writing.memory_bytes, running))


def trace_needs(model: ModelInput, options: BuildOptions) -> tuple[int, int | None]:
    """Bytes of memory, and at most so many of disk, that recording takes; None if the tokens have no limit.

    Raises:
        OptionError: The device or dtype is not available.
    """
    from neuralink_cli.models.hf_packages import require_hf_packages
    from neuralink_cli.profiling.preflight import profile_needs

    require_hf_packages("torch", "transformers", "datasets")
    return profile_needs(
        options.data,
        options.profile.execution,
        model.directory,
        model_blocks(model, options),
        calibrated=options.profile.thresholds.active_ratio is not None,
    )


def forward_needs(model: ModelInput, options: BuildOptions) -> Needs:
    """What running the model and one layout takes: the model, the outputs of both, and a layout as a checkpoint.

    Raises:
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    from neuralink_cli.models.hf_packages import require_hf_packages
    from neuralink_cli.profiling.preflight import comparing_needs

    assert options.forward is not None
    require_hf_packages("torch", "transformers")
    with Checkpoint(model.directory, model.origin) as checkpoint:
        outputs = output_bytes(checkpoint.config, options.forward, rounded=options.rounded)
        files = sum(file.size for file in checkpoint.files)
        weights = sum(prod(place.entry.shape) for place in checkpoint.tensors.values())
    as_checkpoint = 0
    if options.relayout.layout == BUNDLED:
        # Rounded weights are decoded to float32.
        as_checkpoint = 4 * weights if options.rounded else files
    return Needs(comparing_needs(model.directory, outputs), as_checkpoint)


def order_needs(trace: Path, options: BuildOptions) -> Needs:
    """What ordering the blocks of a trace takes on this machine.

    Raises:
        InputError: The trace cannot be read.
    """
    cluster = options.cluster
    with Trace(trace) as opened:
        if cluster.dask is not None:
            split = split_tokens(opened, cluster.held_out)
            return worker_needs(opened, split, cluster.pin_hot, cluster.jobs or 1, cluster.dask.workers or 0)
        return cluster_needs(opened, split_tokens(opened, cluster.held_out), cluster.pin_hot, cluster.jobs)


def _unordered(block: FFNBlock) -> PlacementBlock:
    """A block in the order of the checkpoint, of which nothing is known."""
    return PlacementBlock(
        id=block.id,
        neurons=block.neurons,
        activation=block.activation,
        threshold=0.0,
        tokens=0,
        order=ORIGINAL,
        pinned=0,
        bundle_bytes=block.bundle_bytes,
        operation_in_bundles=1.0,
        collapse_gap=0,
        held_out=(),
    )
