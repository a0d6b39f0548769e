"""Which tensors a bundled layout has: name, dtype and shape, before it is decided where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from neuralink_cli.architectures.blocks import BlockPart, FFNBlock, biases_by_neuron, moved_pieces
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import SHARD_INDEX
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.header import tensor_bytes
from neuralink_cli.layout.names import MODEL_CARD
from neuralink_cli.weight_formats.dense import may_be_rounded
from neuralink_cli.weight_formats.formats import SOURCE, part_bytes, require_convertible

# Bytes of an element of the widest dtype.
WIDEST = 8

TensorSpec = tuple[str, str, tuple[int, ...]]


def bundle_specs(
    blocks: Sequence[FFNBlock],
    bundled: Mapping[str, Sequence[BlockPart]],
    alignment: int,
    weights: Mapping[str, str],
) -> list[TensorSpec]:
    """The bundles of every block, with padding between them so that each starts on a multiple of `alignment`.

    Args:
        bundled: The parts in the bundles of each block, by id.
        weights: The format of each role.
    """
    specs: list[TensorSpec] = []
    gap = 0
    for block in blocks:
        if gap:
            specs.append((f"padding.{len(specs)}", "U8", (gap,)))
        parts = bundled[block.id]
        dtype, shape = parts[0].dtype, (block.neurons, len(parts) * block.hidden)
        if any(weights[part.role] != SOURCE for part in parts):
            dtype, shape = "U8", (block.neurons, sum(row_bytes(block, part, weights) for part in parts))
        specs.append((f"{block.id}.bundles", dtype, shape))
        gap = -tensor_bytes(dtype, shape) % alignment
    tail = -sum(tensor_bytes(dtype, shape) for _, dtype, shape in specs) % WIDEST
    return [*specs, (f"padding.{len(specs)}", "U8", (tail,))] if tail else specs


def row_bytes(block: FFNBlock, part: BlockPart, weights: Mapping[str, str]) -> int:
    """Bytes of one neuron's weights in a part."""
    return part_bytes(weights[part.role], block.hidden, part.element_bytes)


def small_specs(
    checkpoint: Checkpoint, blocks: Sequence[FFNBlock], resident: str, weights: Mapping[str, str]
) -> Iterable[TensorSpec]:
    """What else is made for the blocks: orders, frequencies, resident rows and biases by slot."""
    for block in blocks:
        yield f"{block.id}.order", "I32", (block.neurons,)
        yield f"{block.id}.frequency", "F32", (block.neurons,)
        if resident == "gate":
            part = block.firing_part
            dtype, width = part.dtype, block.hidden
            if weights[part.role] != SOURCE:
                dtype, width = "U8", row_bytes(block, part, weights)
            yield f"{block.id}.{part.role}", dtype, (block.neurons, width)
        for part in biases_by_neuron(block):
            assert part.bias is not None
            yield f"{block.id}.{part.role}.bias", checkpoint.place(part.bias).entry.dtype, (block.neurons,)


def source_specs(checkpoint: Checkpoint) -> Iterable[TensorSpec]:
    """What `restore` needs of the files of the source beside their tensors."""
    for file in checkpoint.files:
        yield f"source.{file.path.name}", "U8", (file.header.data_start,)
    for name in verbatim_files(checkpoint):
        yield f"source.{name}", "U8", (len(checkpoint.read_beside(name)),)


def other_specs(checkpoint: Checkpoint, blocks: Sequence[FFNBlock]) -> Iterable[TensorSpec]:
    """The tensors of the source that no order changes, as they are there."""
    moved = moved_pieces(checkpoint, blocks)
    for name in sorted(checkpoint.tensors):
        if name not in moved:
            entry = checkpoint.place(name).entry
            yield name, entry.dtype, entry.shape


def dense_specs(checkpoint: Checkpoint, others: Iterable[TensorSpec], weights: str) -> dict[str, TensorSpec]:
    """The matrices outside the blocks that are rounded, by name.

    Args:
        others: From `other_specs`.
        weights: The format to round them to; `source` for none.

    Raises:
        UnsupportedError: One that needs scales cannot be.
    """
    found: dict[str, TensorSpec] = {}
    for name, dtype, shape in others:
        scaled = name in checkpoint.scaled
        if scaled and len(shape) != 2:
            raise UnsupportedError(
                f"tensor {name!r} is a stack of quantised matrices that is in no block, which cannot be rounded",
                where=checkpoint.directory,
            )
        if scaled:
            require_convertible(weights, name, shape[1], dtype, scaled=True)
        if scaled or (weights != SOURCE and may_be_rounded(name, dtype, shape, weights)):
            found[name] = (name, "U8", (shape[0], part_bytes(weights, shape[1], 0)))
    return found


def verbatim_files(checkpoint: Checkpoint) -> list[str]:
    """Files kept whole inside the layout, because their name would mean something else beside a flash layout."""
    names = [SHARD_INDEX] if checkpoint.sharded else []
    return [*names, MODEL_CARD] if (checkpoint.directory / MODEL_CARD).is_file() else names
