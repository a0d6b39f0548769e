"""The smallest random model of any model type of transformers: its config with the usual sizes made small.

>>> build_smallest(tmp_path / "llama", "llama")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.tiny_models import tokenizer_of

VOCABULARY = 384
# Token ids with a meaning of their own start here, beyond those of the tokenizer.
_FIRST_SPECIAL = 350
# A config that still gives a larger model was not understood.
_MOST_PARAMETERS = 5_000_000
_LAYERS = 2

# Sizes that fit each other, by the names that configs have for them.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "n_embed", "dim", "embed_dim", "emb_dim", "model_dim", "embedding_size",
         "word_embed_proj_dim", "attention_hidden_size", "out_hidden_size", "output_dim", "projection_dim",
         "true_hidden_size", "rnn_hidden_size", "lru_width", "mamba_d_ssm", "cross_attention_hidden_size",
         "input_embedding_size", "backbone_hidden_size", "text_embed_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "ffn_hidden_size", "hidden_dim",
         "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size", "dim_ff",
         "dense_intermediate_size", "mlp_hidden_size"), 40),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_dim", "moe_ffn_hidden_size"), 24),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 20),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth",
         "num_encoder_layers", "num_decoder_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "kv_channels", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "dim_head",
         "global_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
         "max_encoder_position_embeddings", "max_decoder_position_embeddings", "n_ctx", "context_length",
         "block_size"), 130),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts",
         "moe_num_primary_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "moe_top_k", "top_k_experts",
         "moe_router_topk"), 2),
    **dict.fromkeys(
        ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts", "n_group",
         "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
         "mamba_n_groups", "n_groups", "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step",
         "zero_expert_num", "attn_layer_offset"), 1),
    "num_kv_shared_layers": 0,
    "entity_vocab_size": 16,
    "entity_emb_size": 32,
    "pronunciation_vocab_size": 32,
    "shape_vocab_size": 32,
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "num_mem_blocks"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size", "sliding_window", "local_attention",
                     "attention_window"), 16),
    "image_size": 32,
    "patch_size": 8,
    "type_vocab_size": 2,
}  # fmt: skip
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
# Sizes that a default config may leave out.
_NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
# What else a type needs.
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dbrx_ffn": {"ffn_hidden_size": 40},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 5},
    "falcon_h1": {"mamba_d_ssm": 64},
    "deberta": {"type_vocab_size": 0},
    "deberta-v2": {"type_vocab_size": 0},
    "gemma3n_text": {"activation_sparsity_pattern": [0.5, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"intra_bottleneck_size": 32},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "local"]},
}
# Tried in turn until the model runs.
_WAYS: tuple[dict[str, int | None], ...] = (
    {},
    {"num_key_value_heads": 4, "num_kv_heads": 4},
    {"head_dim": None},
    {"sliding_window": None, "chunk_size": None},
    {"hidden_size": 64, "d_model": 64, "head_dim": 16, "qk_rope_head_dim": 16},
    {"num_hidden_layers": 4},
    {"vocab_size": None},
    {"top_k": None, "rotary_dim": None, "type_vocab_size": None, "block_size": None},
)


class NotBuiltError(Exception):
    """No small model could be built."""


def build_smallest(directory: Path, model_type: str, task: str) -> None:
    """Save the smallest random model of a type with a tokenizer into `directory`.

    Every parameter is random, norms and biases included, so that one that is not moved with its neurons shows.

    Raises:
        NotBuiltError: The usual sizes do not make a model that runs on text.
    """
    reasons = []
    for way in _WAYS:
        try:
            model = _build(model_type, task, way)
        except NotBuiltError as error:
            reasons.append(str(error))
            continue
        except Exception as error:
            # Whatever a config or a model does not like.
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
            continue
        model.save_pretrained(directory)
        tokenizer_of("bert" if task == "encoder" else "llama").save_pretrained(directory)
        return
    raise NotBuiltError(reasons[0])


def model_class(model_type: str, task: str) -> Any:
    """The class that a model of the type is built with."""
    import transformers as hf
    from transformers.models.auto import modeling_auto as auto

    if task == "seq2seq":
        return hf.AutoModelForSeq2SeqLM
    if task == "causal-lm":
        return hf.AutoModelForCausalLM
    return hf.AutoModelForMaskedLM if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else hf.AutoModel


def model_inputs(task: str) -> dict[str, Any]:
    """Some tokens."""
    import torch

    ids = torch.tensor([[1, *(3 + (7 * k) % 60 for k in range(23)), 2]])
    return {"input_ids": ids, **({"decoder_input_ids": ids} if task == "seq2seq" else {})}


def first_output(model: Any, task: str) -> Any:
    """What a model computes from them: logits or hidden states."""
    import torch

    with torch.inference_mode():
        output = model(**model_inputs(task))
    return output.logits if hasattr(output, "logits") else output[0]


def _build(model_type: str, task: str, way: Mapping[str, int | None]) -> Any:
    import torch
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    config = type(default)(**_shrunk(default, way, iter(range(_FIRST_SPECIAL, VOCABULARY))))
    auto = model_class(model_type, task)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise NotBuiltError(f"still has {count:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    for scale in (0.2, 0.05):
        _randomise(model, scale)
        if torch.isfinite(first_output(model, task)).all():
            return model
    raise NotBuiltError("gives outputs that are no numbers")


def _randomise(model: Any, scale: float) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=scale)


def _shrunk(config: Any, way: Mapping[str, int | None], special: Iterator[int]) -> dict[str, Any]:
    """Arguments for a config like this one, with small sizes."""
    sizes = {**_SIZES, **way}
    names = {**getattr(config, "attribute_map", {})}
    found: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        size = sizes.get(key)
        own = next((sizes[alias] for alias, name in names.items() if name == key and alias in sizes), None)
        size = own if size is None else size
        if key in config.sub_configs:
            part = getattr(config, key)
            if part is not None:
                found[key] = {**_shrunk(part, way, special), "model_type": part.model_type}
        elif key in _TOKEN_IDS:
            found[key] = _TOKEN_IDS[key]
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[key] = next(special)
        elif key == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            found[key] = {**value, "mrope_section": [2, 1, 1]}
        elif size is not None and (type(value) is int or (value is None and key in _NEEDED)):
            found[key] = size
        elif size is not None and isinstance(value, list) and value and isinstance(value[0], int):
            found[key] = [size] * (_LAYERS if len(value) > 1 else 1)
    return {**found, **_OWN.get(config.model_type, {})}
