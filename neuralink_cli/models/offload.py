"""Models larger than memory: weights that do not fit stay on disk and are read for every batch."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.loaded_size import loaded_bytes
from neuralink_cli.errors import OptionError, UnsupportedError, first_line
from neuralink_cli.files.free_memory import available_memory
from neuralink_cli.models.hf_packages import require_hf_packages
from neuralink_cli.sizes import human_bytes

logger = logging.getLogger(__name__)

# The share of free memory that weights may take by default; the rest is for activations.
_SHARE = 0.8


@dataclass(frozen=True)
class MemoryLimit:
    """How much RAM weights may take, and where to store weights that cannot be read from the checkpoint as they are.

    Attributes:
        max_memory: Bytes; None for most of the free RAM.
        folder: For weights that do not fit and that transformers rearranges as it loads them (MoE experts). Without a
            folder, models with such weights cannot be offloaded.
        free: Bytes of free RAM, where other processes are about to take some; None to look at what is free.
    """

    max_memory: int | None = None
    folder: Path | None = None
    free: int | None = None


def weight_bytes(directory: Path, dtype: str, *, with_head: bool = True) -> int:
    """Bytes that the weights of a checkpoint take, as `loaded_bytes`."""
    with Checkpoint(directory) as checkpoint:
        return loaded_bytes(checkpoint, dtype, with_head=with_head)


def placement_options(directory: Path, dtype: str, device: torch.device, limit: MemoryLimit) -> dict[str, Any]:
    """The arguments of `from_pretrained` that offload weights; empty if all weights fit on the device.

    Raises:
        OptionError: The device does not support offloading, or the limit is below 1 byte.
        MissingDependencyError: accelerate is needed and not installed.
    """
    if limit.max_memory is not None and limit.max_memory < 1:
        raise OptionError(f"--max-memory {limit.max_memory} leaves no room for weights")
    if device.type not in ("cpu", "cuda"):
        if limit.max_memory is not None:
            raise OptionError(f"--max-memory works on CPUs and CUDA devices, not on {device.type!r}")
        return {}
    needed = weight_bytes(directory, dtype)
    free = available_memory() if limit.free is None else limit.free
    on_cpu = int(_SHARE * free) if limit.max_memory is None else limit.max_memory
    # Weights pass through RAM on their way to a GPU.
    room: dict[int | str, int] = {"cpu": on_cpu}
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        room = {number: int(_SHARE * torch.cuda.mem_get_info(number)[0]), **room}
    if needed <= min(room.values()):
        return {}
    require_hf_packages("accelerate")
    folder = None if limit.folder is None else str(limit.folder)
    return {"device_map": "auto", "max_memory": room, "offload_folder": folder}


def finish_placement(model: Any, missing: Iterable[str]) -> None:
    """Make a loaded model ready to run, and warn about the weights that stay on disk.

    Args:
        missing: Weights that the checkpoint lacks and may lack. They become zero if they are offloaded.
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
        "%s of %s of weights do not fit in memory and are read again for every batch",
        human_bytes(away),
        human_bytes(total),
    )


@contextlib.contextmanager
def explained_offloading() -> Iterator[None]:
    """Around a running model: turns torch's error about weights left on disk into ours.

    Raises:
        UnsupportedError: The model uses weights without running their module, so they are not loaded.
    """
    try:
        yield
    except RuntimeError as error:
        if re.search(r"\bmeta\b", str(error)) is None:
            raise
        raise UnsupportedError(
            f"the model uses offloaded weights without running their module ({first_line(error)})",
            fix="free some memory, or raise --max-memory",
        ) from None


def input_device(model: Any) -> torch.device:
    """The device for a model's inputs; `model.device` may be that of weights which are not loaded yet."""
    hook = getattr(model, "_hf_hook", None)
    device: torch.device = model.device if hook is None else torch.device(hook.execution_device)
    return device


@contextlib.contextmanager
def quiet_accelerate() -> Iterator[None]:
    """Silence accelerate within the block: `finish_placement` gives the same warning."""
    accelerate = logging.getLogger("accelerate.big_modeling")
    level = accelerate.level
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(level)
