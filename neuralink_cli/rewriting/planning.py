"""Decides everything about a layout before the first byte is written, and checks that it can be had."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

from neuralink_cli.architectures.blocks import BlockPart, FFNBlock
from neuralink_cli.calibration.digests import DIGEST_BYTES
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.scaled_tensors import WAY_OUT
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel, stated_device
from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.files.header import DTYPE_BITS, TensorEntry, build_header
from neuralink_cli.layout.companions import companions_to_copy
from neuralink_cli.layout.names import BUNDLED, PERMUTED
from neuralink_cli.layout.plan import (
    BundledPlan,
    BundlePart,
    DenseTensor,
    FlashBlock,
    RelayoutOptions,
    RelayoutPlan,
    ResidentTensor,
    SourceFile,
    TensorRange,
)
from neuralink_cli.placement.placement import ORDERING_SEQUENCES, Placement, PlacementBlock
from neuralink_cli.rewriting.held_memory import held_while_writing
from neuralink_cli.rewriting.placement_check import check_placed_blocks, check_placement
from neuralink_cli.rewriting.planned_size import own_bytes
from neuralink_cli.rewriting.tensor_specs import (
    WIDEST,
    TensorSpec,
    bundle_specs,
    dense_specs,
    other_specs,
    row_bytes,
    small_specs,
    source_specs,
    verbatim_files,
)
from neuralink_cli.weight_formats.formats import (
    AS_IN_SOURCE,
    MXFP4,
    NEAREST,
    ROUNDINGS,
    SOURCE,
    require_carried,
    require_convertible,
    require_roles,
)

logger = logging.getLogger(__name__)

MAX_ALIGNMENT = 1 << 24


def plan_relayout(
    checkpoint: Checkpoint,
    blocks: tuple[FFNBlock, ...],
    placement: Placement,
    options: RelayoutOptions,
    *,
    read_samples: bool = True,
) -> RelayoutPlan:
    """Check that checkpoint and placement belong together and decide everything that will be written.

    Args:
        blocks: All FFN blocks of the checkpoint.
        read_samples: Whether to compare fingerprints, which takes samples of the weights; else only headers are read.

    Raises:
        OptionError: An alignment that is not a power of two, `resident` or `weights` with a permuted layout, or a
            format for a role that the model has not.
        MismatchError: The placement was made for another checkpoint.
        UnsupportedError: Weights that cannot be stored as asked for.
    """
    check_options(options)
    if read_samples:
        check_placement(checkpoint, blocks, placement)
    else:
        check_placed_blocks(blocks, placement)
    if options.layout == PERMUTED and checkpoint.scaled:
        raise UnsupportedError(
            "has quantised weights, whose scales belong to blocks of neurons in the order of the checkpoint",
            where=checkpoint.directory,
            fix=f"use --layout bundled with --weights q4_0, or {WAY_OUT}",
        )
    require_roles(options.formats, (part.role for block in blocks for part in block.parts), "--weights")
    beside = companions_to_copy(checkpoint, all_files=options.all_files)
    bundled = None
    weight_bytes = sum(file.size for file in checkpoint.files)
    if options.layout == BUNDLED:
        placed = {block.id: block for block in placement.info.blocks}
        bundled = plan_bundled(
            checkpoint,
            blocks,
            placed,
            device=stated_device(placement.info.parameters, placement.path),
            ordering_sequences=placement.ordering_sequences.shape[0],
            resident=options.resident,
            alignment=options.alignment,
            weights=options.formats,
            rounding=options.rounding,
            dense_weights=options.dense_format,
        )
        weight_bytes = bundled.file_bytes
        _tell_of_other_bundles(bundled, placement, options)
    return RelayoutPlan(
        source=checkpoint.directory,
        options=options,
        blocks=blocks,
        bundled=bundled,
        weight_bytes=weight_bytes,
        companions=tuple(file.name for file in beside.companions),
        companion_bytes=sum(file.nbytes for file in beside.companions),
        left_out=beside.left_out,
        own_bytes=own_bytes(checkpoint, blocks, placement, bundled),
        held_bytes=held_while_writing(checkpoint, blocks, bundled),
    )


def _tell_of_other_bundles(plan: BundledPlan, placement: Placement, options: RelayoutOptions) -> None:
    made_for = {block.id: block.bundle_bytes for block in placement.info.blocks}
    differing = [block for block in plan.blocks if block.stride != made_for[block.id]]
    if differing:
        first = differing[0]
        logger.info(
            "the order was made for bundles of %s bytes, these have %s (first in %s): `cluster%s` makes it for them",
            f"{made_for[first.id]:,}",
            f"{first.stride:,}",
            first.id,
            (" --resident gate" if plan.resident == "gate" else "")
            + (f" --weights {options.weights}" if options.weights != SOURCE else ""),
        )


def check_options(options: RelayoutOptions) -> None:
    """Check what can be checked without a model.

    Raises:
        OptionError: An option is out of range, or options do not go together.
    """
    if options.alignment < 1 or options.alignment > MAX_ALIGNMENT or options.alignment & (options.alignment - 1):
        raise OptionError(f"--alignment {options.alignment} is not a power of two up to {MAX_ALIGNMENT}")
    if options.layout == PERMUTED and options.resident != "none":
        raise OptionError("--resident needs --layout bundled: a permuted layout keeps every tensor where it was")
    rounded = set(options.formats.values()) != {SOURCE}
    if options.layout == PERMUTED and (rounded or options.dense_format != SOURCE):
        option = "--weights" if rounded else "--dense-weights"
        raise OptionError(f"{option} needs --layout bundled: a permuted layout keeps every tensor as it was")
    if options.rounding not in ROUNDINGS:
        raise OptionError(f"--rounding {options.rounding!r} is not one of {', '.join(ROUNDINGS)}")


def plan_bundled(
    checkpoint: Checkpoint,
    blocks: Sequence[FFNBlock],
    placed: Mapping[str, PlacementBlock],
    *,
    device: DeviceModel | None = None,
    ordering_sequences: int = 0,
    resident: str = "none",
    alignment: int = 4096,
    weights: Mapping[str, str] = AS_IN_SOURCE,
    rounding: str = NEAREST,
    dense_weights: str = SOURCE,
) -> BundledPlan:
    """Plan the bundled layout of a checkpoint.

    Bundles come first, each tensor on a multiple of `alignment`; where a tensor does not fill its last page, a padding
    tensor follows it. All other tensors follow from a multiple of 8 on, wide dtypes first, so that each is naturally
    aligned.

    Args:
        placed: What the placement says of every block, by id.
        device: What reads of these bundles cost; by default the gap is the placement's, for bundles as it knows them.
        ordering_sequences: How many sequences made the order.
        resident: "none", or "gate" to keep the rows that decide firing out of the bundles.
        weights: The format to store weights in, by role.
        rounding: How the scales of rounded weights are found.
        dense_weights: The format of matrices outside the blocks, of those that `may_be_rounded`.

    Raises:
        UnsupportedError: A block whose parts differ in dtype, or cannot be rounded to a format; or a checkpoint that
            uses a tensor name of the layout.
    """
    weights = {role: _as_in_source(checkpoint, blocks, role, name) for role, name in weights.items()}
    for block in blocks:
        for part in block.parts:
            scaled = part.weight in checkpoint.scaled
            if weights[part.role] == MXFP4.name:
                floats = _is_mxfp4(checkpoint, part)
                require_carried(block.id, part.role, part.neuron_axis, block.hidden, part.start, floats=floats)
            require_convertible(weights[part.role], block.id, block.hidden, part.dtype, scaled=scaled)
    bundled = {block.id: _bundled_parts(checkpoint, block, resident) for block in blocks}
    specs = bundle_specs(blocks, bundled, alignment, weights)
    others = tuple(other_specs(checkpoint, blocks))
    dense = dense_specs(checkpoint, others, dense_weights)
    seen: TensorSpec = (ORDERING_SEQUENCES, "U8", (ordering_sequences, DIGEST_BYTES))
    rest = [
        seen,
        *small_specs(checkpoint, blocks, resident, weights),
        *source_specs(checkpoint),
        *(dense.get(spec[0], spec) for spec in others),
    ]
    specs += sorted(rest, key=lambda spec: -DTYPE_BITS[spec[1]])
    try:
        header = build_header(specs, {}, alignment=max(alignment, WIDEST))
    except ValueError as error:
        raise UnsupportedError(f"cannot be laid out: {error}", where=checkpoint.directory) from None
    ranges = {entry.name: _range(entry, header.data_start) for entry in header.entries}
    return BundledPlan(
        header=header,
        alignment=alignment,
        resident=resident,
        blocks=tuple(
            _flash_block(block, bundled[block.id], placed[block.id], ranges, resident, device, weights)
            for block in blocks
        ),
        sources=_source_files(checkpoint, ranges),
        rounding=rounding,
        dense=tuple(_dense_tensor(checkpoint, ranges[name], dense_weights) for name in dense),
    )


def _as_in_source(checkpoint: Checkpoint, blocks: Sequence[FFNBlock], role: str, weights: str) -> str:
    """The format of a role: rows that are MXFP4 in the source stay so as mxfp4, not in the bytes of the source."""
    parts = [part for block in blocks for part in block.parts if part.role == role]
    stays = all(_is_mxfp4(checkpoint, part) and part.neuron_axis == 0 for part in parts)
    return MXFP4.name if parts and weights == SOURCE and stays else weights


def _is_mxfp4(checkpoint: Checkpoint, part: BlockPart) -> bool:
    packed = checkpoint.packed.get(part.weight)
    return packed is not None and packed.floats


def _bundled_parts(checkpoint: Checkpoint, block: FFNBlock, resident: str) -> tuple[BlockPart, ...]:
    if len({part.dtype for part in block.parts}) > 1:
        kinds = ", ".join(f"{part.weight} {part.dtype}" for part in block.parts)
        raise UnsupportedError(
            f"parts of {block.id} differ in dtype ({kinds}), so they cannot form a bundle",
            where=checkpoint.directory,
            fix="convert the checkpoint to one dtype, or use --layout permuted",
        )
    firing = block.firing_part
    return tuple(part for part in block.parts if resident == "none" or part is not firing)


def _dense_tensor(checkpoint: Checkpoint, place: TensorRange, weights: str) -> DenseTensor:
    entry = checkpoint.place(place.tensor).entry
    return DenseTensor(place, entry.shape[1], entry.dtype, weights)


def _range(entry: TensorEntry, data_start: int) -> TensorRange:
    return TensorRange(entry.name, data_start + entry.start, entry.nbytes, entry.dtype, entry.shape)


def _flash_block(
    block: FFNBlock,
    bundled: Sequence[BlockPart],
    placed: PlacementBlock,
    ranges: Mapping[str, TensorRange],
    resident: str,
    device: DeviceModel | None,
    weights: Mapping[str, str],
) -> FlashBlock:
    sizes = [row_bytes(block, part, weights) for part in bundled]
    stride = sum(sizes)
    _require_aligned_parts(block, bundled, sizes, weights)
    gap = placed.collapse_gap if device is None else collapse_gap(device.operation_in_bundles(stride))
    parts = tuple(
        BundlePart(
            part.role,
            part.weight,
            part.neuron_axis,
            stop - size,
            size,
            *_place(block, part),
            weights[part.role],
            part.lane,
            part.lanes,
        )
        for part, size, stop in zip(bundled, sizes, itertools.accumulate(sizes), strict=True)
    )
    kept = []
    if resident == "gate":
        firing = block.firing_part
        place = ranges[f"{block.id}.{firing.role}"]
        kept.append(
            ResidentTensor(
                firing.role,
                "rows",
                firing.weight,
                firing.neuron_axis,
                place,
                *_place(block, firing),
                weights[firing.role],
                firing.lane,
                firing.lanes,
            )
        )
    for part in block.parts:
        if part.bias is not None and part.role == "down":
            place = ranges[part.bias]
            size = DTYPE_BITS[place.dtype] // 8
            kept.append(ResidentTensor("down", "output_bias", part.bias, 0, place, part.bias_start * size, size))
        elif part.bias is not None:
            place = ranges[f"{block.id}.{part.role}.bias"]
            region = block.bias_region(part, place.dtype)
            kept.append(ResidentTensor(part.role, "bias", part.bias, 0, place, region.start, region.pitch))
    return FlashBlock(
        id=block.id,
        expert=None if block.expert is None else block.expert.index,
        neurons=block.neurons,
        hidden=block.hidden,
        dtype=bundled[0].dtype,
        activation=block.activation,
        threshold=placed.threshold,
        pinned=placed.pinned,
        collapse_gap=gap,
        stride=stride,
        bundles=ranges[f"{block.id}.bundles"],
        parts=parts,
        resident=tuple(kept),
        order=ranges[f"{block.id}.order"],
        frequency=ranges[f"{block.id}.frequency"],
        up_values=block.up_values,
    )


def _require_aligned_parts(
    block: FFNBlock, bundled: Sequence[BlockPart], sizes: Sequence[int], weights: Mapping[str, str]
) -> None:
    """Parts as in the source are moved as whole elements, so they must lie on multiples of them in every bundle."""
    for part, size, stop in zip(bundled, sizes, itertools.accumulate(sizes), strict=True):
        if weights[part.role] == SOURCE and ((stop - size) % part.element_bytes or sum(sizes) % part.element_bytes):
            raise UnsupportedError(
                f"the {part.role} weights, left as {part.dtype}, do not lie on whole elements beside rounded parts of "
                f"{block.hidden} weights",
                where=block.id,
                fix="give every role a format in --weights",
            )


def _place(block: FFNBlock, part: BlockPart) -> tuple[int, int]:
    region = block.region(part)
    return region.start, region.pitch


def _source_files(checkpoint: Checkpoint, ranges: Mapping[str, TensorRange]) -> tuple[SourceFile, ...]:
    weights = [
        SourceFile(file.path.name, "weights", file.size, ranges[f"source.{file.path.name}"])
        for file in checkpoint.files
    ]
    verbatim = [
        SourceFile(name, "verbatim", ranges[f"source.{name}"].bytes, ranges[f"source.{name}"])
        for name in verbatim_files(checkpoint)
    ]
    return (*weights, *verbatim)
