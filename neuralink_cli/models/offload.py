"""Models that do not fit into memory: the weights that have no room stay on the disk and are read for every batch."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import OptionError, UnsupportedError, first_line
from neuralink_cli.models.hf_packages import require_hf_packages
from neuralink_cli.sizes import human_bytes

logger = logging.getLogger(__name__)

# Of the memory that is free, what weights may take without being asked for; the rest is for what the model computes.
_SHARE = 0.8
_CGROUP = Path("/sys/fs/cgroup")
# Bytes of a number of the dtypes that models are computed in.
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})


@dataclass(frozen=True)
class MemoryLimit:
    """How much of the CPU's memory weights may take, and where those go that cannot be read from the checkpoint as is.

    Attributes:
        max_memory: Bytes; None for most of what is free.
        folder: Of the weights that transformers rearranges as it loads them (experts) and that have no room. Without
            one, models that have such weights cannot be offloaded.
    """

    max_memory: int | None = None
    folder: Path | None = None


def weight_bytes(directory: Path, dtype: str) -> int:
    """Bytes that the weights of a checkpoint take in a dtype; "auto" is their own."""
    with Checkpoint(directory) as checkpoint:
        entries = [place.entry for place in checkpoint.tensors.values()]
    if dtype == "auto":
        return sum(entry.nbytes for entry in entries)
    return sum(prod(entry.shape) * FLOAT_BYTES[dtype] if entry.dtype in _FLOATS else entry.nbytes for entry in entries)


def placement_options(directory: Path, dtype: str, device: torch.device, limit: MemoryLimit) -> dict[str, Any]:
    """What `from_pretrained` is to be told so that the weights find room; nothing if they have it on the device.

    Raises:
        OptionError: A limit for a device that has no offloading, or of nothing.
        MissingDependencyError: accelerate is needed and not installed.
    """
    if limit.max_memory is not None and limit.max_memory < 1:
        raise OptionError(f"--max-memory {limit.max_memory} leaves no room for weights")
    if device.type not in ("cpu", "cuda"):
        if limit.max_memory is not None:
            raise OptionError(f"--max-memory works on CPUs and CUDA devices, not on {device.type!r}")
        return {}
    needed = weight_bytes(directory, dtype)
    on_cpu = int(_SHARE * available_memory()) if limit.max_memory is None else limit.max_memory
    # On their way to a device, weights pass through the memory of the CPU.
    room: dict[int | str, int] = {"cpu": on_cpu}
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        room = {number: int(_SHARE * torch.cuda.mem_get_info(number)[0]), **room}
    if needed <= min(room.values()):
        return {}
    require_hf_packages("accelerate")
    folder = None if limit.folder is None else str(limit.folder)
    return {"device_map": "auto", "max_memory": room, "offload_folder": folder}


def available_memory() -> int:
    """Bytes of memory that can be had without swapping, within the limits of the container if there are any."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
        free = min(free, limit - used)
    return max(free, 0)


def finish_placement(model: Any, missing: Iterable[str]) -> None:
    """Make a model whose weights were placed ready to run, and say what it leaves on the disk.

    Args:
        missing: Weights that the checkpoint lacks, and may lack: they become zero.
    """
    away = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.is_meta)
    if not away:
        return
    for name in missing:
        module, _, leaf = name.rpartition(".")
        hook: Any = getattr(model.get_submodule(module), "_hf_hook", None)
        if getattr(hook, "offload", False):
            weights = hook.weights_map
            value = torch.zeros_like(model.get_parameter(name), device="cpu")
            weights.dataset.state_dict[weights.prefix + leaf] = value
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    logger.warning(
        "%s of %s of weights have no room in memory and are loaded again for every batch",
        human_bytes(away),
        human_bytes(total),
    )


@contextlib.contextmanager
def explained_offloading() -> Iterator[None]:
    """Within the block a model runs: what it needs of weights that were left on the disk is told in our words.

    Raises:
        UnsupportedError: It uses weights without running the module that has them, so that they are not loaded.
    """
    try:
        yield
    except RuntimeError as error:
        if re.search(r"\bmeta\b", str(error)) is None:
            raise
        raise UnsupportedError(
            f"the model uses weights that were left on the disk without running their module ({first_line(error)})",
            fix="free some memory, or give it more --max-memory",
        ) from None


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs; its own `device` may be that of weights which are not there yet."""
    hook = getattr(model, "_hf_hook", None)
    device: torch.device = model.device if hook is None else torch.device(hook.execution_device)
    return device


@contextlib.contextmanager
def quiet_accelerate() -> Iterator[None]:
    """Within the block accelerate does not say what `finish_placement` says."""
    accelerate = logging.getLogger("accelerate.big_modeling")
    level = accelerate.level
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(level)
