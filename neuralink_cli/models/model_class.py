"""Which class of transformers runs a checkpoint, and with which config."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.json_text import read_foreign_object

# Tasks whose models have a head that computes logits.
TASKS_WITH_HEAD = ("causal-lm", "seq2seq")
# What classes are called whose heads compute something else.
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def model_class(task: str, *, with_head: bool, code: Collection[str] = ()) -> Any:
    """The class that loads a model of a task, with what computes logits or without.

    Args:
        code: Classes for which code that comes with the model is to be run: with a head if there is none without.
    """
    import transformers

    heads = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    head = heads.get(task, "AutoModel")
    return getattr(transformers, head if with_head or ("AutoModel" not in code and head in code) else "AutoModel")


def saved_without_head(directory: Path, task: str) -> bool:
    """Whether config.json says that the checkpoint is of a task that needs a head, but not with that head.

    It is a base model (`LlamaModel`), or one that classifies.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    document = read_foreign_object(directory / CONFIG_FILE)
    kind, named = document.get("model_type"), document.get("architectures")
    base = MODEL_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    bases = (base,) if isinstance(base, str) else base or ()
    if task not in TASKS_WITH_HEAD or not isinstance(named, list) or len(named) != 1:
        return False
    return named[0] in bases or str(named[0]).endswith(_OTHER_HEADS)


def stand_in_config(directory: Path, architecture: Architecture) -> Any:
    """The config of the model type in `runs_as`, with the checkpoint's values; None without `runs_as`.

    Raises:
        UnsupportedError: transformers has no such model.
    """
    if architecture.runs_as is None:
        return None
    from transformers import CONFIG_MAPPING

    document = read_foreign_object(directory / CONFIG_FILE)
    if architecture.runs_as not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"runs as {architecture.runs_as!r}, a model type that transformers does not have", where=directory
        )
    register_fatrelu(float(document.get("hidden_act_param", 0.0)))
    own = {key: value for key, value in document.items() if key not in ("model_type", "auto_map", "architectures")}
    for key in architecture.activation_keys:
        # What a config leaves out is the default of its own code, not that of the model that stands in.
        own.setdefault(key, architecture.activation_default)
    return CONFIG_MAPPING[architecture.runs_as].from_dict(own)


def register_fatrelu(threshold: float) -> None:
    """Register FATReLU (ProSparse) with transformers: values above the threshold stay, all others become zero."""
    import torch
    from transformers.activations import ACT2FN

    ACT2FN["fatrelu"] = (torch.nn.Threshold, {"threshold": threshold, "value": 0.0})


def activate_up_projections(model: Any, architecture: Architecture, activation: str) -> None:
    """Apply the activation to every up projection too (dReLU, TurboSparse)."""
    from transformers.activations import ACT2FN

    function = ACT2FN[activation]
    stems = {pattern.parts["up"].weight.rpartition("${layer}")[2].rpartition(".")[0] for pattern in architecture.blocks}
    for name, module in model.named_modules():
        if name.endswith(tuple(stems)):
            module.register_forward_hook(lambda _module, _inputs, output: function(output))
