"""Estimates what a profiling run takes: memory and disk before it starts, time as soon as it can be told."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from neuralink_cli.activations.threshold import HISTOGRAM_BYTES
from neuralink_cli.activations.trace import bytes_per_token
from neuralink_cli.architectures.blocks import FFNBlock, experts_of
from neuralink_cli.calibration.options import DEFAULT_SEQUENCE_LENGTH, CalibrationOptions
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.loaded_size import FLOAT_BYTES, expert_tensors, loaded_bytes, mapped_bytes
from neuralink_cli.files.free_memory import remark_if_short, resident_bytes, with_margin
from neuralink_cli.kernels import load_compiler
from neuralink_cli.models.execution import ExecutionOptions
from neuralink_cli.models.loading import compute_dtype, find_device
from neuralink_cli.profiling.ranks import ALONE, Ranks
from neuralink_cli.sizes import human_bytes, human_seconds

logger = logging.getLogger(__name__)

# Roughly the values per token that the widest layer of a transformer holds at once: up, gate, activated and multiplied;
# and residual, normalised, queries, keys, values and outputs.
_WIDE_VALUES = 4
_NARROW_VALUES = 6
# What a model's own code, and torch when it first computes, load beside weights: most on processors with AVX-512.
_FIRST_RUN_BYTES = 40 << 20
# What loading and hooking an expert keeps; and loading a tensor of one, and restoring it from a layout.
_EXPERT_BYTES = 24 << 10
_EXPERT_TENSOR_BYTES = 10 << 10
_LEAST_SECONDS = 60.0


def tell_needs(
    data: CalibrationOptions,
    execution: ExecutionOptions,
    part: tuple[int, int] | None,
    directory: Path,
    blocks: Sequence[FFNBlock],
    ranks: Ranks = ALONE,
    *,
    calibrated: bool = False,
) -> None:
    """Log roughly how much memory and disk a run takes with the model in a directory.

    Each rank holds the model.

    Args:
        calibrated: Whether thresholds are calibrated.

    Raises:
        OptionError: The device or dtype is not available.
    """
    parts = _memory_parts(data, execution, directory, blocks, calibrated=calibrated)
    if data.max_tokens is None:
        disk = f"{human_bytes(round(1_000_000 * _disk_per_token(blocks)))} of disk per million tokens"
    else:
        disk = f"at most {human_bytes(_most_disk(data, data.max_tokens, part, blocks))} of disk"
    memory, here = with_margin(_program_bytes() + parts.most), len(ranks.here)
    files = f"{human_bytes(parts.mapped)} of files while they are loaded, " if parts.mapped else ""
    logger.info(
        "%s about %s of memory (%s of weights, %s%s of activations, the rest for programs)%s and %s",
        "takes" if ranks.count == 1 else f"each of {ranks.count} ranks takes",
        human_bytes(memory),
        human_bytes(parts.weights),
        files,
        human_bytes(parts.values),
        "" if ranks.count == 1 else f", together {human_bytes(here * memory)} on this machine",
        disk,
    )
    remark_if_short(memory)


def profile_needs(
    data: CalibrationOptions,
    execution: ExecutionOptions,
    directory: Path,
    blocks: Sequence[FFNBlock],
    *,
    calibrated: bool,
) -> tuple[int, int | None]:
    """Bytes of memory, and at most so many of disk, that a run takes; None if the tokens have no limit.

    Args:
        calibrated: Whether thresholds are calibrated.

    Raises:
        OptionError: The device or dtype is not available.
    """
    # A run has opened its data before it tells what it takes.
    importlib.import_module("datasets")
    parts = _memory_parts(data, execution, directory, blocks, calibrated=calibrated)
    disk = None if data.max_tokens is None else _most_disk(data, data.max_tokens, None, blocks)
    return with_margin(_program_bytes() + parts.most), disk


@dataclass(frozen=True)
class _Parts:
    """Bytes of weights, of the files that they are made from, of activations, and of what is kept of each expert."""

    weights: int
    mapped: int
    values: int
    records: int

    @property
    def most(self) -> int:
        """At the same time: nothing runs before all is loaded."""
        return self.weights + max(self.mapped, self.values) + self.records


def comparing_needs(directory: Path, outputs: int) -> int:
    """Bytes of memory that it takes to run a model on the CPU, with so many bytes of outputs that are kept."""
    # Its text is read before it is loaded.
    importlib.import_module("tokenizers")
    weights, mapped = _weights(directory, "float32", with_head=True)
    with Checkpoint(directory) as checkpoint:
        records = _EXPERT_TENSOR_BYTES * expert_tensors(checkpoint)
    return with_margin(_program_bytes() + _Parts(weights, mapped, outputs, records).most)


def _memory_parts(
    data: CalibrationOptions,
    execution: ExecutionOptions,
    directory: Path,
    blocks: Sequence[FFNBlock],
    *,
    calibrated: bool,
) -> _Parts:
    dtype = compute_dtype(execution.dtype, find_device(execution.device))
    weights, mapped = _weights(directory, dtype)
    if execution.max_memory is not None:
        weights = min(weights, execution.max_memory)
    element_bytes = FLOAT_BYTES.get(dtype, blocks[0].parts[0].element_bytes)
    values = activation_bytes(data, blocks, element_bytes)
    experts = sum(experts_of(block.id) is not None for block in blocks)
    if calibrated:
        # Thousands of experts have hundreds of megabytes of them.
        values += HISTOGRAM_BYTES * experts
    return _Parts(weights, mapped, values, _EXPERT_BYTES * experts)


def _weights(directory: Path, dtype: str, *, with_head: bool = False) -> tuple[int, int]:
    """Bytes of weights, and of the files that they are made from."""
    with Checkpoint(directory) as checkpoint:
        return (
            loaded_bytes(checkpoint, dtype, with_head=with_head),
            mapped_bytes(checkpoint, dtype, with_head=with_head),
        )


def _disk_per_token(blocks: Sequence[FFNBlock]) -> float:
    # Written once to the spool and once to the trace.
    return 2 * bytes_per_token(blocks)


def _most_disk(
    data: CalibrationOptions, max_tokens: int, part: tuple[int, int] | None, blocks: Sequence[FFNBlock]
) -> int:
    tokens = max_tokens * len(data.datasets) // (part[1] if part else 1)
    return round(tokens * _disk_per_token(blocks))


def _program_bytes() -> int:
    # Both are needed in any case, and take more memory than a small model.
    load_compiler()
    importlib.import_module("transformers.modeling_utils")
    return resident_bytes() + _FIRST_RUN_BYTES


def activation_bytes(data: CalibrationOptions, blocks: Sequence[FFNBlock], element_bytes: int) -> int:
    """Roughly the bytes in memory beside the weights for a batch of full sequences."""
    tokens = data.batch_size * (data.max_seq_length or DEFAULT_SEQUENCE_LENGTH)
    widest = max(_WIDE_VALUES * block.neurons + _NARROW_VALUES * block.hidden for block in blocks)
    return tokens * widest * element_bytes


def telling_time(advance: Callable[[int], object], total: int, ranks: int = 1) -> Callable[[int], object]:
    """Wraps `advance`: after the second batch, logs once how long the rest takes, if that is long.

    The first batch is not timed, because it warms up. Other ranks are taken to be as fast as this one.
    """
    done = 0
    first: tuple[float, int] | None = None
    told = False

    def advance_and_tell(count: int) -> None:
        nonlocal done, first, told
        advance(count)
        done += count * ranks
        if first is None:
            first = monotonic(), done
        elif not told:
            told = True
            seconds = (monotonic() - first[0]) / (done - first[1]) * (total - done)
            if seconds >= _LEAST_SECONDS:
                logger.info("recording the other %s tokens takes about %s", f"{total - done:,}", human_seconds(seconds))

    return advance_and_tell
