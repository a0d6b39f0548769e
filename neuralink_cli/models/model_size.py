"""Whether the model that a config describes is about as large as the weights in the files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import InputError

# A model with weights that its checkpoint may lack, or that are made from others, is larger than the files, but not so.
_MOST = 4


def require_size(auto_class: Any, config: Any, directory: Path) -> None:
    """Check that a model is not far larger than its checkpoint, before memory is taken for it.

    transformers takes a size that config.json leaves out for that of a model of billions of weights, and makes these
    from nothing. The model is built without memory for its weights.

    Args:
        auto_class: The class of transformers that loads the model.
        config: A config in place of the checkpoint's own, or None.

    Raises:
        InputError: It is.
    """
    from transformers import AutoConfig

    try:
        with torch.device("meta"):
            model = auto_class.from_config(config or AutoConfig.from_pretrained(str(directory), local_files_only=True))
    except Exception:
        # It fails again as it is loaded, and that error is told.
        return
    described = sum(weight.numel() for weight in model.parameters())
    with Checkpoint(directory) as checkpoint:
        stored = sum(math.prod(place.entry.shape) for place in checkpoint.tensors.values())
        if checkpoint.scaled or described <= _MOST * stored:
            return
    raise InputError(
        f"describes a model of {described:,} weights, and the files have {stored:,}",
        where=directory / CONFIG_FILE,
        fix="download the whole checkpoint, or complete config.json: sizes that it leaves out (hidden_size, "
        "num_hidden_layers) are those of a large model",
    )
