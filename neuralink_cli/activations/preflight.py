"""Estimates what a profiling run takes: memory and disk before it starts, time as soon as it can be told."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from neuralink_cli.activations.ranks import ALONE, Ranks
from neuralink_cli.activations.trace import bytes_per_token
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.calibration.options import DEFAULT_SEQUENCE_LENGTH, CalibrationOptions
from neuralink_cli.checkpoint.loaded_size import FLOAT_BYTES
from neuralink_cli.files.free_memory import resident_bytes, with_margin
from neuralink_cli.kernels import load_compiler
from neuralink_cli.models.execution import ExecutionOptions
from neuralink_cli.models.loading import compute_dtype, find_device
from neuralink_cli.models.offload import weight_bytes
from neuralink_cli.sizes import human_bytes, human_seconds

logger = logging.getLogger(__name__)

# Roughly the values per token that the widest layer of a transformer holds at once: up, gate, activated and multiplied;
# and residual, normalised, queries, keys, values and outputs.
_WIDE_VALUES = 4
_NARROW_VALUES = 6
_LEAST_SECONDS = 60.0


def tell_needs(
    data: CalibrationOptions,
    execution: ExecutionOptions,
    part: tuple[int, int] | None,
    directory: Path,
    blocks: Sequence[FFNBlock],
    ranks: Ranks = ALONE,
) -> None:
    """Log roughly how much memory and disk a run takes with the model in a directory.

    Each rank holds the model.

    Raises:
        OptionError: The device or dtype is not available.
    """
    weights, values = _memory_parts(data, execution, directory, blocks)
    if data.max_tokens is None:
        disk = f"{human_bytes(round(1_000_000 * _disk_per_token(blocks)))} of disk per million tokens"
    else:
        disk = f"at most {human_bytes(_most_disk(data, data.max_tokens, part, blocks))} of disk"
    memory, here = with_margin(_program_bytes() + weights + values), len(ranks.here)
    logger.info(
        "%s about %s of memory (%s of weights, %s of activations, the rest for programs)%s and %s",
        "takes" if ranks.count == 1 else f"each of {ranks.count} ranks takes",
        human_bytes(memory),
        human_bytes(weights),
        human_bytes(values),
        "" if ranks.count == 1 else f", together {human_bytes(here * memory)} on this machine",
        disk,
    )


def profile_needs(
    data: CalibrationOptions, execution: ExecutionOptions, directory: Path, blocks: Sequence[FFNBlock]
) -> tuple[int, int | None]:
    """Bytes of memory, and at most so many of disk, that a run takes; None if the tokens have no limit.

    Raises:
        OptionError: The device or dtype is not available.
    """
    # A run has opened its data before it tells what it takes.
    importlib.import_module("datasets")
    weights, values = _memory_parts(data, execution, directory, blocks)
    disk = None if data.max_tokens is None else _most_disk(data, data.max_tokens, None, blocks)
    return with_margin(_program_bytes() + weights + values), disk


def _memory_parts(
    data: CalibrationOptions, execution: ExecutionOptions, directory: Path, blocks: Sequence[FFNBlock]
) -> tuple[int, int]:
    """Bytes of weights and of activations."""
    dtype = compute_dtype(execution.dtype, find_device(execution.device))
    weights = weight_bytes(directory, dtype, with_head=False)
    if execution.max_memory is not None:
        weights = min(weights, execution.max_memory)
    return weights, activation_bytes(data, blocks, FLOAT_BYTES.get(dtype, blocks[0].parts[0].element_bytes))


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
    return resident_bytes()


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
