"""What a model's config says about FFN blocks under the usual keys: sizes, activation, task, layers, experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuralink_cli.checkpoint.config import config_value
from neuralink_cli.checkpoint.model_description import ModelDescription

_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "n_embed", "dim", "model_dim")
_NEURON_KEYS = (
    "intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "ffn_hidden_size", "hidden_dim", "encoder_ffn_dim",
    "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "intermediate_size_mlp", "moe_ffn_hidden_size", "mlp_hidden_size", "inner_dim",
)  # fmt: skip
_RATIO_KEYS = ("expansion_ratio", "mlp_ratio", "ffn_ratio")
_SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
# The first key that is set decides.
_ACTIVATION_KEYS = (
    "hidden_activation", "hidden_act", "activation_function", "activation", "act_fn", "dense_act_fn", "mlp_hidden_act",
    "feed_forward_proj",
)  # fmt: skip
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
_DECODERS = ("ForCausalLM", "LMHeadModel")
_ENCODERS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "Model")


@dataclass(frozen=True)
class Sizes:
    """The hidden size (weights per neuron and projection), and the possible numbers of neurons in a block."""

    hidden: int
    neurons: frozenset[int]

    def __str__(self) -> str:
        listed = ", ".join(map(str, sorted(self.neurons)))
        return f"hidden size {self.hidden} and intermediate size {listed}"


def read_sizes(model: ModelDescription) -> Sizes:
    """The sizes in a config. Without an intermediate size, it is four times the hidden size.

    Raises:
        UnsupportedError: The config has no hidden size.
    """
    config = model.config
    hidden = next((size for key in _HIDDEN_KEYS for size in _counts(config, key)), None)
    if hidden is None:
        raise model.refusal(f"config.json names no hidden size ({', '.join(_HIDDEN_KEYS)})")
    neurons = {size for key in _NEURON_KEYS for size in _counts(config, key)}
    neurons |= {ratio * hidden for key in _RATIO_KEYS for ratio in _counts(config, key)}
    shared = {count for key in _SHARED_KEYS for count in _counts(config, key)}
    neurons |= {count * size for count in shared for size in _counts(config, "moe_intermediate_size")}
    return Sizes(hidden, frozenset(neurons or {4 * hidden}))


def read_activation(model: ModelDescription) -> dict[str, Any]:
    """The `activation` of an architecture.

    Raises:
        UnsupportedError: The config does not name it.
    """
    for key in _ACTIVATION_KEYS:
        value = config_value(model.config, key)
        if not isinstance(value, str) or not value:
            continue
        bare = value.removeprefix("gated-")
        if bare == value:
            return {"config": [key]}
        # The spelling of T5.
        return {"config": [key], "names": {value: "gelu_new" if bare == "gelu" else bare or value}}
    raise model.refusal(f"config.json names no activation ({', '.join(_ACTIVATION_KEYS)})")


def read_task(model: ModelDescription, *, two_stacks: bool, encoder: bool) -> str:
    """The task of the model, by the name of its class.

    Args:
        two_stacks: The model has the layers of an encoder and of a decoder.
        encoder: The name of its layers says encoder.

    Raises:
        UnsupportedError: The class does not tell.
    """
    config = model.config
    named = config.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    found = classes[0] if classes else ""
    if two_stacks:
        return "seq2seq"
    if found.endswith(_DECODERS):
        return "causal-lm"
    if found.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") is not True and not encoder:
        # For example, a model of images and text, of which only the text model matters.
        return "causal-lm"
    images = found.endswith("ForImageClassification") or (encoder and _counts(config, "patch_size") != [])
    if images and not _counts(config, "vocab_size"):
        return "image-encoder"
    if found.endswith("ForMaskedLM") or (encoder and found.endswith(_ENCODERS)):
        return "encoder"
    said = f"architectures {classes}"[:200] if classes else "no architectures"
    raise model.refusal(f"config.json names {said}, which does not tell whether the model is a causal-lm or an encoder")


def layer_count(config: Mapping[str, Any], stack: str) -> tuple[str, int] | None:
    """The config key for the number of layers of a stack, and its value."""
    steps = stack.lower().split(".")
    own: tuple[str, ...] = ()
    if "decoder" in steps:
        own = ("decoder_layers", "num_decoder_layers")
    elif "encoder" in steps:
        own = ("encoder_layers", "num_encoder_layers")
    return _first_count(config, own + _LAYER_KEYS)


def expert_count(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The config key for the number of experts of a layer, and its value."""
    return _first_count(config, _EXPERT_KEYS)


def experts_per_token(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The config key for how many experts a token is routed to, and its value."""
    return _first_count(config, _PER_TOKEN_KEYS)


def _first_count(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int] | None:
    for key in keys:
        value = config_value(config, key)
        if type(value) is int and value > 0:
            return key, value
    return None


def _counts(config: Mapping[str, Any], key: str) -> list[int]:
    """The positive whole numbers under a key; the config may list one per layer."""
    value = config_value(config, key)
    values = value if isinstance(value, list) else [value]
    return [int(v) for v in values if type(v) in (int, float) and 0 < v < 2**40 and v == int(v)]
