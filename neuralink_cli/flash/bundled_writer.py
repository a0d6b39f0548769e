"""Streams a planned bundled layout into its file, one tensor after the other, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.checkpoint.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.header import DTYPE_BITS
from neuralink_cli.checkpoint.regions import Region
from neuralink_cli.flash.bundling import gather_part
from neuralink_cli.flash.output_file import OutputFile
from neuralink_cli.flash.plan import BundledPlan, FlashBlock, ResidentTensor, SourceFile
from neuralink_cli.placement.placement import Order, PlacedBlock

Bytes = npt.NDArray[np.uint8]
Chunks = Iterator[Bytes]
CHUNK = 1 << 24


def write_bundled(
    path: Path,
    plan: BundledPlan,
    checkpoint: Checkpoint,
    placed: Mapping[str, PlacedBlock],
    progress: Callable[[int], object] | None = None,
) -> str:
    """Write the flash file at `path` and return its SHA-256."""
    producers = _producers(plan, checkpoint, placed)
    with OutputFile(path, progress) as output:
        output.write(plan.header.prelude)
        for entry in plan.header.entries:
            before = output.size
            for chunk in producers[entry.name]():
                output.write(chunk)
            if output.size - before != entry.nbytes:
                raise ValueError(f"tensor {entry.name!r} got {output.size - before} bytes, not {entry.nbytes}")
        return output.sha256


def tensor_chunks(checkpoint: Checkpoint, name: str) -> Chunks:
    """The bytes of a tensor of the checkpoint, in chunks that share one buffer."""
    place = checkpoint.place(name)
    buffer = np.empty(min(CHUNK, place.entry.nbytes), dtype=np.uint8)
    for start in range(0, place.entry.nbytes, CHUNK):
        part = buffer[: min(CHUNK, place.entry.nbytes - start)]
        place.file.read_into(name, part, start)
        yield part


def _producers(
    plan: BundledPlan, checkpoint: Checkpoint, placed: Mapping[str, PlacedBlock]
) -> dict[str, Callable[[], Chunks]]:
    producers: dict[str, Callable[[], Chunks]] = {}
    for entry in plan.header.entries:
        if entry.name in checkpoint:
            producers[entry.name] = partial(tensor_chunks, checkpoint, entry.name)
        else:
            producers[entry.name] = partial(_zeros, entry.nbytes)
    for block in plan.blocks:
        arrays = placed[block.id]
        producers[block.bundles.tensor] = partial(_bundle_chunks, block, checkpoint, arrays.order)
        producers[block.order.tensor] = partial(_array_chunks, arrays.order)
        producers[block.frequency.tensor] = partial(_array_chunks, arrays.frequency)
        for resident in block.resident:
            if resident.kind != "output_bias":
                producers[resident.place.tensor] = partial(_resident_chunks, block, resident, checkpoint, arrays.order)
    for source in plan.sources:
        producers[source.stored.tensor] = partial(_source_chunks, source, checkpoint)
    return producers


def _bundle_chunks(block: FlashBlock, checkpoint: Checkpoint, order: Order) -> Chunks:
    bundles = np.empty(block.bundles.bytes, dtype=np.uint8)
    for part in block.parts:
        region = block.source_region(part)
        matrix = _read_region(checkpoint, region)
        gather_part(matrix, region, order, DTYPE_BITS[block.dtype] // 8, bundles, block.stride, part.offset)
    yield bundles


def _resident_chunks(block: FlashBlock, resident: ResidentTensor, checkpoint: Checkpoint, order: Order) -> Chunks:
    region = block.source_region(resident)
    rows = np.empty(resident.place.bytes, dtype=np.uint8)
    element_bytes = DTYPE_BITS[resident.place.dtype] // 8
    gather_part(_read_region(checkpoint, region), region, order, element_bytes, rows, rows.size // order.size, 0)
    yield rows


def _read_region(checkpoint: Checkpoint, region: Region) -> Bytes:
    return checkpoint.place(region.tensor).file.read(region.tensor, region.start, region.stop)


def _source_chunks(source: SourceFile, checkpoint: Checkpoint) -> Chunks:
    if source.kind == "verbatim":
        content = (checkpoint.directory / source.name).read_bytes()
    else:
        content = next(file.header.prelude for file in checkpoint.files if file.path.name == source.name)
    yield np.frombuffer(content, dtype=np.uint8)


def _array_chunks(array: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> Chunks:
    yield array.view(np.uint8)


def _zeros(count: int) -> Chunks:
    yield np.zeros(count, dtype=np.uint8)


def block_bytes(block: FFNBlock) -> int:
    """Peak memory that writing a block takes: its bundles and one of its matrices."""
    largest = max(part.element_bytes for part in block.parts) * block.hidden
    return block.neurons * (block.bundle_bytes + largest)
