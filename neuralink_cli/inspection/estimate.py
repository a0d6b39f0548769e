"""What a layout will gain and need, before a byte is rewritten.

Of the model only headers are read. The sizes are those of the plan that `relayout` follows, and the figures those of
the replay that `bench` does, so both are what they will be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice
from neuralink_cli.architectures.workable_blocks import find_workable_blocks
from neuralink_cli.bench.budgets import BudgetFigures, replay_budgets
from neuralink_cli.bench.contenders import (
    Contender,
    choose_tokens,
    first_tokens,
    planned_contender,
    read_contender,
)
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import DeviceModel, default_device, stated_device
from neuralink_cli.errors import MismatchError, OptionError, OutputError
from neuralink_cli.inspection.estimate_report import (
    REPLAYED,
    SHARES,
    STATED,
    BlockSizes,
    BudgetNeeds,
    EstimateOptions,
    EstimateReport,
    MemoryNeeds,
    RelayoutNeeds,
)
from neuralink_cli.inspection.facts import kept_in_dram
from neuralink_cli.inspection.reading import speed_needed
from neuralink_cli.layout.plan import RelayoutPlan
from neuralink_cli.placement.gain import total_gain
from neuralink_cli.placement.placement import ORIGINAL, STORED, Placement
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.rewriting.planned_size import planned_size
from neuralink_cli.rewriting.planning import check_options, plan_relayout
from neuralink_cli.rewriting.relayout import held_by_plan, relayout_pass
from neuralink_cli.streaming.estimate import memory_bytes, program_bytes

# So that large models take about a minute, no more tokens are replayed than about so many neurons fire at.
_MOST_FIRING = 20_000_000
# What `relayout` has in memory of a block in a placement, and in a plan.
_PLANNED_BYTES = 10 << 10


def estimate(
    model: str | Path,
    *,
    placement: Path | None = None,
    trace: Path | None = None,
    options: EstimateOptions = EstimateOptions(),
    revision: str | None = None,
    architecture: ArchitectureChoice = BUILT_IN,
    allow_uncovered: bool = False,
    progress: Progress = no_progress,
) -> EstimateReport:
    """Say what the layout of a checkpoint will gain and need.

    With a placement and a trace, held-out tokens are replayed as `bench` replays them. With a placement alone, the
    gain is what the placement states. With a trace alone, an order is made first, in a temporary file.

    Args:
        model: As for `relayout`. Only the headers of its weights are read, so their fingerprint is not compared.

    Raises:
        OptionError: Neither placement nor trace, or options that make no sense for this layout.
        MismatchError: They are of different models, as far as headers tell.
        InputError, UnsupportedError: As `relayout`.
    """
    if placement is None and trace is None:
        raise OptionError("there is nothing to estimate from", fix="pass --placement, --trace or both")
    check_options(options.layout)
    with ExitStack() as stack:
        opened = None if placement is None else stack.enter_context(Placement(placement))
        tokens = None if trace is None else stack.enter_context(Trace(trace))
        source = find_model(model, revision, all_files=options.layout.all_files)
        checkpoint = stack.enter_context(Checkpoint(source.directory, source.origin))
        blocks = find_workable_blocks(checkpoint, architecture, allow_uncovered=allow_uncovered).blocks
        programs = 0
        if opened is None:
            assert tokens is not None
            # Before an order is made, which `relayout` does not do.
            programs = program_bytes() + _PLANNED_BYTES * len(blocks)
            _check_model(checkpoint, blocks, tokens)
            opened = stack.enter_context(_made_for_this(tokens, options, progress))
        elif tokens is not None:
            tokens.check_content()
        if opened.info.model["model_type"] != checkpoint.model_type:
            raise _other_model(opened.path, opened.info.model["model_type"], checkpoint)
        plan = plan_relayout(checkpoint, blocks, opened, options.layout, read_samples=False)
        # And before tokens are replayed.
        programs = programs or program_bytes()
        device = options.device or _device_of(opened)
        memory = _memory(plan, checkpoint, opened)
        replayed = None
        if tokens is not None:
            replayed = _replay(Path(str(model)), plan, opened, tokens, device, options, progress)
            budgets = tuple(_needs(each, options) for each in replayed.budgets)
        else:
            budgets = tuple(_stated(plan, opened, memory, device, options))
        return EstimateReport(
            model=str(model),
            origin=source.origin,
            layout=options.layout.layout,
            resident=options.layout.resident,
            weights=options.layout.weights,
            dense_weights=options.layout.dense_format,
            order=total_gain(opened.info).chosen,
            placement=None if placement is None else str(placement),
            effort=options.effort if placement is None else None,
            blocks=tuple(_block_sizes(plan, opened)),
            source_bytes=sum(file.size for file in checkpoint.files),
            size=planned_size(plan, checkpoint, opened),
            memory=memory,
            relayout=_writing(plan, checkpoint, programs, options.disk_speed),
            device=device.name,
            tokens_per_second=options.tokens_per_second,
            figures=REPLAYED if replayed is not None else STATED if budgets else None,
            tokens=None if replayed is None else replayed.tokens,
            held_out=None if replayed is None else replayed.held_out,
            budgets=budgets,
        )


def _writing(plan: RelayoutPlan, checkpoint: Checkpoint, programs: int, disk_speed: int | None) -> RelayoutNeeds:
    work = relayout_pass(plan, checkpoint)
    seconds = None if disk_speed is None else (work.read + work.written) / disk_speed
    memory = memory_bytes([work], held_by_plan(plan), programs)
    return RelayoutNeeds(work.read, work.written, memory, seconds)


def _check_model(checkpoint: Checkpoint, found: Sequence[FFNBlock], trace: Trace) -> None:
    """Check, before an order is made, that a trace has the blocks of a checkpoint."""
    if trace.info.model["model_type"] != checkpoint.model_type:
        raise _other_model(trace.path, trace.info.model["model_type"], checkpoint)
    blocks = {block.id: (block.neurons, block.hidden) for block in found}
    traced = {block.id: (block.neurons, block.hidden) for block in trace.info.blocks}
    if blocks != traced:
        differing = sorted(set(blocks.items()) ^ set(traced.items()))[0][0]
        raise MismatchError(f"does not fit the checkpoint's blocks (first at {differing})", where=trace.path)


def _other_model(path: Path, model_type: str, checkpoint: Checkpoint) -> MismatchError:
    return MismatchError(
        f"is of a model of type {model_type}, but {checkpoint.directory} is {checkpoint.model_type}",
        where=path,
        fix="profile and cluster this checkpoint",
    )


def _made_for_this(trace: Trace, options: EstimateOptions, progress: Progress) -> Placement:
    """An order of the neurons of a trace, made as `cluster` makes it for this layout.

    Its file has a name only while it is written and opened, so that hardly any killed run leaves one.
    """
    output = Path(gettempdir()) / f"neuralink-estimate-{token_hex(8)}.safetensors"
    made = ClusterOptions(
        device=options.device or default_device(),
        weights=options.layout.weights,
        resident=options.layout.resident,
        effort=options.effort,
        jobs=options.jobs,
    )
    try:
        cluster(trace.path, output, made, progress=progress)
        return Placement(output)
    except OutputError as error:
        fix = "free some space there, or set TMPDIR to another folder"
        raise OutputError(
            f"the order cannot be kept for the estimate: {error.what}", where=output.parent, fix=fix
        ) from error
    finally:
        output.unlink(missing_ok=True)


def _device_of(placement: Placement) -> DeviceModel:
    return stated_device(placement.info.parameters, placement.path) or default_device()


@dataclass(frozen=True)
class _Replayed:
    tokens: int
    held_out: int
    budgets: tuple[BudgetFigures, ...]


def _replay(
    name: Path,
    plan: RelayoutPlan,
    placement: Placement,
    trace: Trace,
    device: DeviceModel,
    options: EstimateOptions,
    progress: Progress,
) -> _Replayed:
    """Replay the tokens of a trace that made no order, as many as take about a minute if that is not stated."""
    if plan.bundled is None:
        contender = read_contender(placement.path, trace)
    else:
        contender = planned_contender(name, plan.bundled, placement, trace)
    held_out = choose_tokens(trace, [contender], None, None)
    tokens = first_tokens(held_out, options.tokens or _affordable(contender, len(options.budgets)))
    budgets = replay_budgets(trace, contender, device, options.policy, tokens, options.budgets, progress=progress)
    return _Replayed(sum(part.tokens for part in tokens), sum(part.tokens for part in held_out), budgets)


def _affordable(contender: Contender, budgets: int) -> int:
    # How many fire is taken from the tokens that made the order.
    firing = max(sum(float(block.frequency.sum()) for block in contender.blocks), 1.0)
    return max(int(_MOST_FIRING * len(SHARES) / max(budgets, 1) / firing), 1)


def _needs(figures: BudgetFigures, options: EstimateOptions) -> BudgetNeeds:
    means = figures.figures
    return BudgetNeeds(
        share=figures.budget.fraction,
        dram_bytes=figures.dram_bytes,
        hit_rate=means.hit_rate,
        reads=means.reads,
        read_bytes=means.bytes_read,
        io_seconds=means.io_mean,
        gain=figures.gain,
        gain_over_naive=figures.gain_over_naive,
        speed_needed=speed_needed(means.io_mean, options.tokens_per_second),
    )


def _stated(
    plan: RelayoutPlan, placement: Placement, memory: MemoryNeeds, device: DeviceModel, options: EstimateOptions
) -> Iterator[BudgetNeeds]:
    """What a placement states: without a cache, for the device and the bundles that it was made for, if it is those."""
    info = placement.info
    gain = next((each for each in info.gains if each.source is None and each.order == STORED), None)
    same_bundles = _strides(plan, placement) == [block.bundle_bytes for block in info.blocks]
    if gain is None or not same_bundles or device != _device_of(placement):
        return
    seconds = total_gain(info).orders[ORIGINAL].bytes_per_token / gain.gain.value / device.bytes_per_second
    yield BudgetNeeds(
        share=0.0,
        dram_bytes=memory.resident_bytes + memory.pinned_bytes,
        hit_rate=None,
        reads=None,
        read_bytes=None,
        io_seconds=seconds,
        gain=gain.gain,
        gain_over_naive=gain.gain_over_naive,
        speed_needed=speed_needed(seconds, options.tokens_per_second),
    )


def _strides(plan: RelayoutPlan, placement: Placement) -> list[int]:
    """Bytes of a bundle of each block; those of a permuted layout are as its order knows them."""
    if plan.bundled is None:
        return [block.bundle_bytes for block in placement.info.blocks]
    return [block.stride for block in plan.bundled.blocks]


def _block_sizes(plan: RelayoutPlan, placement: Placement) -> Iterator[BlockSizes]:
    sizes: Sequence[tuple[str, int, int, int]] = [
        (block.id, block.neurons, block.bundle_bytes, stride)
        for block, stride in zip(plan.blocks, _strides(plan, placement), strict=True)
    ]
    for (neurons, source, stride), group in groupby(sizes, lambda each: each[1:]):
        same = list(group)
        yield BlockSizes(same[0][0], len(same), neurons, source, stride)


def _memory(plan: RelayoutPlan, checkpoint: Checkpoint, placement: Placement) -> MemoryNeeds:
    if plan.bundled is None:
        whole = checkpoint.total_bytes
        return MemoryNeeds(whole, 0, 0, 0, whole)
    blocks = plan.bundled.blocks
    names = {entry.name for file in checkpoint.files for entry in file.header.entries}
    kept = kept_in_dram(blocks, plan.bundled.header.entries, names)
    firing = sum(float(placement.blocks[block.id].frequency.sum()) * block.stride for block in blocks)
    # A cache has room for a bundle beside those that are pinned.
    smallest = sum(min(block.pinned + 1, block.neurons) * block.stride for block in blocks)
    least = kept["dense"] + kept["resident"] + max(round(firing), smallest)
    return MemoryNeeds(kept["dense"], kept["resident"], kept["pinned"], round(firing), least)
