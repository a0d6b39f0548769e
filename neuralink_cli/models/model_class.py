"""Which class of transformers runs a checkpoint, and the config that it is made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.json_text import read_object

# Tasks whose models have a head that computes logits.
TASKS_WITH_HEAD = ("causal-lm", "seq2seq")


def model_class(task: str, *, with_head: bool) -> Any:
    """The class that loads a model of a task, with what computes logits or without."""
    import transformers

    if not with_head:
        return transformers.AutoModel
    heads = {"causal-lm": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}
    return heads[task]


def stand_in_config(directory: Path, architecture: Architecture) -> Any:
    """The config of the model that an architecture runs as, with the checkpoint's values; None if it is its own.

    Raises:
        UnsupportedError: transformers has no such model.
    """
    if architecture.runs_as is None:
        return None
    from transformers import CONFIG_MAPPING

    document = read_object(directory / CONFIG_FILE)
    if architecture.runs_as not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"runs as {architecture.runs_as!r}, a model that transformers does not have", where=directory
        )
    register_fatrelu(float(document.get("hidden_act_param", 0.0)))
    own = {key: value for key, value in document.items() if key not in ("model_type", "auto_map", "architectures")}
    for key in architecture.activation_keys:
        # What a config leaves out is the default of its own code, not that of the model that stands in.
        own.setdefault(key, architecture.activation_default)
    return CONFIG_MAPPING[architecture.runs_as].from_dict(own)


def register_fatrelu(threshold: float) -> None:
    """Teach transformers FATReLU (ProSparse): a value above the threshold stays as it is, all others are zero."""
    import torch
    from transformers.activations import ACT2FN

    ACT2FN["fatrelu"] = (torch.nn.Threshold, {"threshold": threshold, "value": 0.0})


def activate_up_projections(model: Any, architecture: Architecture, activation: str) -> None:
    """Let the values of every up projection go through the activation too (dReLU, TurboSparse)."""
    from transformers.activations import ACT2FN

    function = ACT2FN[activation]
    stems = {pattern.parts["up"].weight.rpartition("${layer}")[2].rpartition(".")[0] for pattern in architecture.blocks}
    for name, module in model.named_modules():
        if name.endswith(tuple(stems)):
            module.register_forward_hook(lambda _module, _inputs, output: function(output))
