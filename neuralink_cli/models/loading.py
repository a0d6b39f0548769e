"""Loads a checkpoint with transformers, and makes sure that every weight comes from it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.checkpoint.config import read_config, stated_quantization
from neuralink_cli.checkpoint.file_names import CONFIG_FILE, SHARD_INDEX
from neuralink_cli.checkpoint.scaled_tensors import is_stacked_mxfp4, may_have_scales
from neuralink_cli.errors import InputError, MissingDependencyError, OptionError, UnsupportedError, first_line
from neuralink_cli.models.execution import DTYPES
from neuralink_cli.models.loading_report import require_loaded
from neuralink_cli.models.model_class import activate_up_projections, model_class, stand_in_config
from neuralink_cli.models.model_errors import explained_model_errors
from neuralink_cli.models.model_size import require_size
from neuralink_cli.models.offload import (
    MemoryLimit,
    finish_placement,
    input_device,
    placement_options,
    quiet_accelerate,
)
from neuralink_cli.models.own_code import code_model_classes, settle_own_code
from neuralink_cli.models.tokenizer import load_error

# Config keys for the number of positions.
_POSITION_KEYS = ("max_position_embeddings", "max_seq_len")


def load_model(
    directory: Path,
    architecture: Architecture,
    *,
    with_head: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    limit: MemoryLimit = MemoryLimit(),  # noqa: B008 - it is frozen
    trust_remote_code: bool = False,
    ignore_remote_code: bool = False,
) -> Any:
    """A local checkpoint as a transformers model, ready for inference.

    Args:
        with_head: Load the head that computes logits too, not the base model alone.
        device: A torch device, or "auto": an accelerator if there is one.
        dtype: One of `DTYPES`; "auto" is float32 on the CPU and the checkpoint's own elsewhere.
        limit: The memory limit for weights; weights beyond it are read for every batch. Inputs go to `input_device`.
        trust_remote_code, ignore_remote_code: What becomes of code that comes with the model, see `settle_own_code`.

    Raises:
        InputError: Weights are missing or do not fit, or transformers fails for another reason.
        UnsupportedError: The model comes with code of its own, and nothing is said about it.
        OptionError: The device or dtype is not available, or the device does not support the limit.
        MissingDependencyError: The weights do not fit, and accelerate is not installed; or they are those of
            compressed-tensors, and the package is not.
    """
    code = settle_own_code(directory, architecture, trust=trust_remote_code, ignore=ignore_remote_code)
    place = find_device(device)
    dtype = compute_dtype(dtype, place)
    placement = placement_options(directory, dtype, place, limit)
    config = stand_in_config(directory, architecture)
    own = code_model_classes(directory) if code == "run" else frozenset()
    auto_class = model_class(architecture.task, with_head=with_head, code=own)
    if own and auto_class.__name__ not in own:
        raise UnsupportedError(
            f"its own code has {', '.join(sorted(own))} and no {auto_class.__name__}", where=directory
        )
    dequantising = _dequantising(directory)
    if not own and not dequantising:
        require_size(auto_class, config, directory)
    # Random weights are refused below, except weights that a checkpoint may lack: the seed makes those repeatable.
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), quiet_accelerate():
            warnings.simplefilter("ignore")
            model, report = auto_class.from_pretrained(
                str(directory),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # What does not fit is told below, in words that say which weight it is.
                ignore_mismatched_sizes=True,
                **({} if config is None else {"config": config}),
                **dequantising,
                **placement,
            )
        if dequantising:
            _widen(model, dtype)
        if not placement:
            model = model.to(place)
    except Exception as error:
        raise _known_cause(error, architecture, directory) or load_error("model", directory, error) from error
    require_loaded(report, model, architecture, directory)
    finish_placement(model, report["missing_keys"])
    model.config.use_cache = False
    if any(pattern.experts for pattern in architecture.blocks) and hasattr(model, "set_experts_implementation"):
        # The faster implementations accept only some matrix sizes.
        model.set_experts_implementation("eager")
    if config is not None and architecture.up_activation:
        activate_up_projections(model, architecture, config.hidden_act)
    return model.eval().requires_grad_(False)


def _known_cause(error: Exception, architecture: Architecture, directory: Path) -> InputError | None:
    """The error if transformers fails without words for it: at a name that it does not know, or at a bare index."""
    if isinstance(error, KeyError) and error.args == ("metadata",) and (directory / SHARD_INDEX).is_file():
        return InputError(
            "has no metadata, which transformers needs", where=directory / SHARD_INDEX, fix='add "metadata": {} to it'
        )
    key = _key_of(error.args[0], read_config(directory)) if isinstance(error, KeyError) and error.args else None
    if key is None:
        return None
    names = ": they are called relu, relu2, silu, gelu, gelu_pytorch_tanh and the like"
    return InputError(
        f"{key} is {error.args[0]!r}, which transformers does not know",
        where=directory / CONFIG_FILE,
        fix="correct it" + (names if key in architecture.activation_keys else ""),
    )


def _key_of(value: object, config: Mapping[str, Any]) -> str | None:
    """The key of a config, or of what is in it, whose value is a text."""
    for key, found in config.items():
        if isinstance(found, str) and found == value:
            return key
        inner = _key_of(value, found) if isinstance(found, dict) else None
        if inner is not None:
            return inner
    return None


def _dequantising(directory: Path) -> dict[str, Any]:
    """Options that have transformers load compressed-tensors and MXFP4 as numbers; FP8 it does by itself on CPUs.

    Raises:
        MissingDependencyError: transformers needs the package compressed-tensors for that, which is not installed.
    """
    quantization = stated_quantization(read_config(directory))
    if is_stacked_mxfp4(quantization):
        from transformers import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if not may_have_scales(quantization) or quantization["quant_method"] != "compressed-tensors":
        return {}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependencyError(
            "is quantised (compressed-tensors): transformers loads such models with the Python package of that name",
            where=directory,
            fix="pip install compressed-tensors",
        )
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _widen(model: Any, dtype: str) -> None:
    """Give all weights the dtype that was asked for: transformers leaves those of experts in that of their scales."""
    if dtype == "auto":
        return
    wanted = getattr(torch, dtype)
    for parameter in model.parameters():
        # What is kept in float32 is meant to be.
        if parameter.is_floating_point() and parameter.dtype not in (wanted, torch.float32):
            parameter.data = parameter.data.to(wanted)


def compute_dtype(dtype: str, device: torch.device) -> str:
    """Resolve "auto": float32 on the CPU; elsewhere it stays "auto", the checkpoint's own dtype.

    Raises:
        OptionError: Not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype


def find_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA or MPS if there is one, else the CPU.

    Raises:
        OptionError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {name!r} cannot be used ({first_line(error)})", fix="try --device cpu") from None
    return device


def max_positions(model: Any) -> int | None:
    """The longest sequence that the model has positions for, if it has a limit."""
    config = model.config.get_text_config()
    stated = (getattr(config, key, None) for key in _POSITION_KEYS)
    limit = next((value for value in stated if isinstance(value, int) and value > 0), None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        # RoBERTa counts positions from after the padding index; the rows before are unused.
        if name.endswith("position_embeddings") and padding is not None:
            limit -= padding + 1
    return limit


def count_image_tokens(model: Any, pixels: npt.NDArray[np.float32]) -> int:
    """How many tokens a model makes from an image, float32 `[1, channels, height, width]`.

    Raises:
        InputError: The model does not accept such images.
    """
    try:
        with explained_model_errors(model), torch.inference_mode():
            output = model(pixel_values=torch.from_numpy(pixels).to(input_device(model), model.dtype))
    except (RuntimeError, ValueError, InputError) as error:
        problem = f"the model does not accept images of shape {list(pixels.shape)} ({first_line(error)})"
        raise InputError(problem) from error
    return int(output.last_hidden_state.shape[1])
