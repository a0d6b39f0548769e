"""Every family of models that is supported: the tiny transformers model that stands for it, and what is in it.

The table in docs/supported.md is made from this one and from what the tests do with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN = 16
LAYERS = 2
MAX_POSITIONS = 64
VOCABULARY = 320
# Of most families the number of neurons is no multiple of 8.
EXPERTS = 4


@dataclass(frozen=True)
class Family:
    """A tiny model.

    Attributes:
        model_type: What its config calls it.
        classes: Names of the config's and the model's class in transformers.
        options: Of the config.
        neurons: Of each block, by id.
        gated: Whether its blocks have gates.
        task: As in its architecture.
        tokenizer: Kind of tokenizer; see `models.py`.
        activation: Name of the config's key for it, and its value; None if the config has none.
        ffn: Module of the first layer's FFN in the base model, for blocks that run on all tokens.
        weights: Tensors of the first layer's FFN: gate (or None), up.
        positions: How many the model has, if it has a limit.
        fused_on_disk: Whether it is saved with the experts of a layer in one tensor, as they are in memory.
        renamed: A model type that is put into config.json instead: checkpoints with code of their own.
        stripped: What transformers puts before the names of tensors, and the hub's checkpoints have not.
    """

    model_type: str
    classes: tuple[str, str]
    options: Mapping[str, Any]
    neurons: Mapping[str, int]
    gated: bool
    activation: tuple[str | None, str]
    ffn: str | None = None
    weights: tuple[str | None, str] | None = None
    task: str = "causal-lm"
    tokenizer: str = "llama"
    positions: int | None = MAX_POSITIONS
    fused_on_disk: bool = False
    renamed: str | None = None
    stripped: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether neurons that do not fire are exactly zero."""
        return self.activation[1] in ("relu", "relu2", "fatrelu")


def _layers(neurons: int, *, stem: str = "layers.", layers: int = LAYERS) -> dict[str, int]:
    return {f"{stem}{layer}": neurons for layer in range(layers)}


def _experts(neurons: int, layers: tuple[int, ...] = tuple(range(LAYERS))) -> dict[str, int]:
    return {f"layers.{layer}.experts.{expert}": neurons for layer in layers for expert in range(EXPERTS)}


def _with_shared(neurons: int, name: str, shared: int) -> dict[str, int]:
    """Layers of experts and a shared one."""
    return {
        block: count
        for layer in range(LAYERS)
        for block, count in {**_experts(neurons, (layer,)), f"layers.{layer}.{name}": shared}.items()
    }


_COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "tie_word_embeddings": False}


def _usual(neurons: int, **others: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": HIDDEN,
        "intermediate_size": neurons,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        **others,
    }


def _llama(model_type: str, name: str, neurons: int, activation: str = "silu", **options: Any) -> Family:
    """A family with Llama's FFN."""
    key = options.pop("activation_key", "hidden_act")
    special = {key_: options.pop(key_) for key_ in ("tokenizer", "renamed", "config") if key_ in options}
    config = options.pop("config_class", f"{name}Config")
    return Family(
        model_type,
        (config, f"{name}ForCausalLM"),
        _usual(neurons, num_key_value_heads=1, **options),
        _layers(neurons),
        gated=True,
        activation=(key, activation),
        ffn="layers.0.mlp",
        weights=("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        **special,
    )


def _fused(model_type: str, name: str, neurons: int = 37, **options: Any) -> Family:
    """A family whose gate and up rows are in one tensor."""
    return Family(
        model_type,
        (f"{name}Config", f"{name}ForCausalLM"),
        _usual(neurons, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, **{"head_dim": 8, **options}),
        _layers(neurons),
        gated=True,
        activation=("hidden_act", "silu"),
    )


def _squared(model_type: str, name: str, **options: Any) -> Family:
    """A family with the squared ReLU and no gate."""
    return Family(
        model_type,
        (f"{name}Config", f"{name}ForCausalLM"),
        _usual(52, num_key_value_heads=1, **options),
        _layers(52),
        gated=False,
        activation=("hidden_act", "relu2"),
        ffn="layers.0.mlp",
        weights=(None, "model.layers.0.mlp.up_proj"),
    )


def _moe(model_type: str, name: str, blocks: Mapping[str, int], **options: Any) -> Family:
    """A family with gated experts."""
    key = options.pop("activation_key", "hidden_act")
    config, stripped = options.pop("config_class", f"{name}Config"), options.pop("stripped", "")
    return Family(
        model_type,
        (config, f"{name}ForCausalLM"),
        _usual(52, **{**_MOE, **options}),
        blocks,
        gated=True,
        activation=(key, "silu"),
        stripped=stripped,
    )


_T5 = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "num_layers": LAYERS, "num_heads": 2}
_MOE = {"num_key_value_heads": 1, "num_experts_per_tok": 2}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_DEEPSEEK = {
    **_MLA, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# As DeepSeek's, without its attention.
_GROUPED = {
    "n_routed_experts": EXPERTS, "moe_intermediate_size": 20, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 16}
_GEMMA: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "head_dim": 8}

FAMILY: dict[str, Family] = {
    "opt": Family(
        "opt",
        ("OPTConfig", "OPTForCausalLM"),
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 52,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "init_std": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        _layers(52),
        gated=False,
        activation=("activation_function", "relu"),
        ffn="decoder.layers.0.fc1",
        weights=(None, "model.decoder.layers.0.fc1"),
        tokenizer="opt",
    ),
    "llama": _llama("llama", "Llama", 37),
    "mistral": _llama("mistral", "Mistral", 52),
    "qwen2": _llama("qwen2", "Qwen2", 40, tokenizer="qwen2"),
    "qwen3": _llama("qwen3", "Qwen3", 37, head_dim=8, tokenizer="qwen3"),
    "gemma": _llama("gemma", "Gemma", 44, **_GEMMA, tie_word_embeddings=True),
    "gemma2": _llama("gemma2", "Gemma2", 44, **_GEMMA, activation_key="hidden_activation"),
    "gemma3_text": _llama(
        "gemma3_text", "Gemma3", 44, **_GEMMA, activation_key="hidden_activation", config_class="Gemma3TextConfig"
    ),
    # Reads images too; only its text model has FFNs that are ordered.
    "gemma3": Family(
        "gemma3",
        ("Gemma3Config", "Gemma3ForConditionalGeneration"),
        {
            "text_config": _usual(44, num_key_value_heads=1, head_dim=8),
            "vision_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": 37,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        _layers(44),
        gated=True,
        activation=(None, "gelu_pytorch_tanh"),
        ffn="language_model.layers.0.mlp",
        weights=("language_model.model.layers.0.mlp.gate_proj", "language_model.model.layers.0.mlp.up_proj"),
    ),
    "granite": _llama("granite", "Granite", 37),
    "stablelm": _llama("stablelm", "StableLm", 37),
    "smollm3": _llama("smollm3", "SmolLM3", 37),
    "olmo2": _llama("olmo2", "Olmo2", 37),
    "olmo3": _llama("olmo3", "Olmo3", 40),
    "exaone4": _llama("exaone4", "Exaone4", 37),
    "cohere2": _llama("cohere2", "Cohere2", 37),
    "ernie4_5": _llama("ernie4_5", "Ernie4_5", 37, head_dim=8, use_bias=True),
    # Llama's own class with another activation, as ReluLLaMA has it.
    "relu-llama": _llama("llama", "Llama", 52, "relu"),
    # Code of their own, which is not run: Llama with FATReLU, Mistral with the activation on the up projection too.
    "prosparse": _llama("llama", "Llama", 52, "fatrelu", renamed="sparsellama", config={"hidden_act_param": 0.05}),
    "turbosparse": _llama("mistral", "Mistral", 52, "relu", renamed="bamboo"),
    "gpt2": Family(
        "gpt2",
        ("GPT2Config", "GPT2LMHeadModel"),
        {
            "vocab_size": VOCABULARY,
            "initializer_range": 0.2,
            "n_embd": HIDDEN,
            "n_inner": 52,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": MAX_POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        _layers(52),
        gated=False,
        activation=("activation_function", "gelu_new"),
        ffn="h.0.mlp.c_fc",
        weights=(None, "transformer.h.0.mlp.c_fc"),
        tokenizer="gpt2",
    ),
    "bert": Family(
        "bert",
        # With a prefix before every name and without the pooler that AutoModel would like to have.
        ("BertConfig", "BertForMaskedLM"),
        _usual(37),
        _layers(37),
        gated=False,
        activation=("hidden_act", "gelu"),
        ffn="encoder.layer.0.intermediate",
        weights=(None, "bert.encoder.layer.0.intermediate.dense"),
        task="encoder",
        tokenizer="bert",
    ),
    "roberta": Family(
        "roberta",
        # Without a prefix and with a pooler; positions are counted from the padding index + 1.
        ("RobertaConfig", "RobertaModel"),
        _usual(64, max_position_embeddings=MAX_POSITIONS + 2, bos_token_id=0, pad_token_id=1, eos_token_id=2),
        _layers(64),
        gated=False,
        activation=("hidden_act", "gelu"),
        ffn="encoder.layer.0.intermediate",
        weights=(None, "encoder.layer.0.intermediate.dense"),
        task="encoder",
        tokenizer="roberta",
    ),
    "distilbert": Family(
        "distilbert",
        ("DistilBertConfig", "DistilBertForMaskedLM"),
        {
            **_COMMON,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": 2,
            "hidden_dim": 37,
            "max_position_embeddings": MAX_POSITIONS,
        },
        _layers(37),
        gated=False,
        activation=("activation", "gelu"),
        ffn="transformer.layer.0.ffn",
        weights=(None, "distilbert.transformer.layer.0.ffn.lin1"),
        task="encoder",
        tokenizer="bert",
    ),
    "deberta": Family(
        "deberta",
        ("DebertaConfig", "DebertaModel"),
        _usual(37, type_vocab_size=0, relative_attention=True, pos_att_type="c2p|p2c"),
        _layers(37),
        gated=False,
        activation=("hidden_act", "gelu"),
        ffn="encoder.layer.0.intermediate",
        weights=(None, "encoder.layer.0.intermediate.dense"),
        task="encoder",
        tokenizer="bert",
    ),
    "deberta-v2": Family(
        "deberta-v2",
        ("DebertaV2Config", "DebertaV2ForMaskedLM"),
        _usual(37, type_vocab_size=0, relative_attention=True, pos_att_type="c2p|p2c"),
        _layers(37),
        gated=False,
        activation=("hidden_act", "gelu"),
        ffn="encoder.layer.0.intermediate",
        weights=(None, "deberta.encoder.layer.0.intermediate.dense"),
        task="encoder",
        tokenizer="bert",
    ),
    # In its first layer, the lower half of the neurons is cut off.
    "gemma3n_text": Family(
        "gemma3n_text",
        ("Gemma3nTextConfig", "Gemma3nForCausalLM"),
        _usual(
            44,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=4,
            num_kv_shared_layers=0,
            laurel_rank=4,
            layer_types=["full_attention", "full_attention"],
            activation_sparsity_pattern=[0.5, 0.0],
        ),
        _layers(44),
        gated=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    # Its layers differ in the size of their attention heads.
    "gemma4_text": Family(
        "gemma4_text",
        ("Gemma4TextConfig", "Gemma4ForCausalLM"),
        _usual(
            44,
            num_key_value_heads=1,
            head_dim=8,
            global_head_dim=16,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
            enable_moe_block=True,
            num_experts=EXPERTS,
            top_k_experts=2,
            moe_intermediate_size=20,
        ),
        {
            block: count
            for layer in range(LAYERS)
            for block, count in {f"layers.{layer}": 44, **_experts(20, (layer,))}.items()
        },
        gated=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    "apertus": Family(
        "apertus",
        ("ApertusConfig", "ApertusForCausalLM"),
        _usual(52, num_key_value_heads=1),
        _layers(52),
        gated=False,
        activation=("hidden_act", "xielu"),
    ),
    "modernbert": Family(
        "modernbert",
        ("ModernBertConfig", "ModernBertForMaskedLM"),
        _usual(
            37,
            mlp_bias=True,
            layer_types=["full_attention", "sliding_attention"],
            local_attention=16,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
        _layers(37),
        gated=True,
        activation=("hidden_activation", "gelu"),
        task="encoder",
        tokenizer="bert",
    ),
    "nomic_bert": Family(
        "nomic_bert",
        ("NomicBertConfig", "NomicBertForMaskedLM"),
        _usual(37),
        _layers(37),
        gated=True,
        activation=("hidden_act", "silu"),
        task="encoder",
        tokenizer="bert",
    ),
    "vit": Family(
        "vit",
        ("ViTConfig", "ViTForImageClassification"),
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 37,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        _layers(37),
        gated=False,
        activation=("hidden_act", "gelu"),
        ffn="layers.0.mlp",
        weights=(None, "vit.encoder.layer.0.intermediate.dense"),
        task="image-encoder",
        tokenizer="none",
        positions=None,
    ),
    "phi": Family(
        "phi",
        ("PhiConfig", "PhiForCausalLM"),
        _usual(52),
        _layers(52),
        gated=False,
        activation=("hidden_act", "gelu_new"),
        ffn="layers.0.mlp",
        weights=(None, "model.layers.0.mlp.fc1"),
    ),
    "phi3": _fused("phi3", "Phi3"),
    "glm4": _fused("glm4", "Glm4"),
    "gpt_neox": Family(
        "gpt_neox",
        ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
        _usual(52),
        _layers(52),
        gated=False,
        activation=("hidden_act", "gelu"),
        ffn="layers.0.mlp",
        weights=(None, "gpt_neox.layers.0.mlp.dense_h_to_4h"),
    ),
    "gptj": Family(
        "gptj",
        ("GPTJConfig", "GPTJForCausalLM"),
        {
            **_COMMON,
            "n_positions": MAX_POSITIONS,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_inner": 52,
            "rotary_dim": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        _layers(52),
        gated=False,
        activation=("activation_function", "gelu_new"),
        ffn="h.0.mlp",
        weights=(None, "transformer.h.0.mlp.fc_in"),
        tokenizer="gpt2",
    ),
    "falcon": Family(
        "falcon",
        ("FalconConfig", "FalconForCausalLM"),
        {
            **_COMMON,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _layers(4 * HIDDEN),
        gated=False,
        activation=("activation", "gelu"),
        ffn="h.0.mlp",
        weights=(None, "transformer.h.0.mlp.dense_h_to_4h"),
    ),
    "falcon-wide": Family(
        "falcon",
        ("FalconConfig", "FalconForCausalLM"),
        {
            **_COMMON,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "ffn_hidden_size": 52,
            "new_decoder_architecture": True,
            "bias": True,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _layers(52),
        gated=False,
        activation=("activation", "gelu"),
        ffn="h.0.mlp",
        weights=(None, "transformer.h.0.mlp.dense_h_to_4h"),
    ),
    "bloom": Family(
        "bloom",
        ("BloomConfig", "BloomForCausalLM"),
        {**_COMMON, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 2},
        _layers(4 * HIDDEN),
        gated=False,
        activation=(None, "gelu_new"),
        ffn="h.0.mlp",
        weights=(None, "transformer.h.0.mlp.dense_h_to_4h"),
        positions=None,
    ),
    "starcoder2": Family(
        "starcoder2",
        ("Starcoder2Config", "Starcoder2ForCausalLM"),
        _usual(52, num_key_value_heads=1),
        _layers(52),
        gated=False,
        activation=("hidden_act", "gelu_pytorch_tanh"),
        ffn="layers.0.mlp",
        weights=(None, "model.layers.0.mlp.c_fc"),
    ),
    "mpt": Family(
        "mpt",
        ("MptConfig", "MptForCausalLM"),
        {**_COMMON, "d_model": HIDDEN, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": MAX_POSITIONS},
        _layers(4 * HIDDEN),
        gated=False,
        activation=(None, "gelu"),
        ffn="blocks.0.ffn",
        weights=(None, "transformer.blocks.0.ffn.up_proj"),
    ),
    "nemotron": _squared("nemotron", "Nemotron"),
    "arcee": _squared("arcee", "Arcee", mlp_bias=True),
    "t5": Family(
        "t5",
        ("T5Config", "T5ForConditionalGeneration"),
        {**_T5, "d_ff": 52, "decoder_start_token_id": 0},
        {**_layers(52, stem="encoder.layers."), **_layers(52, stem="decoder.layers.")},
        gated=False,
        activation=(None, "relu"),
        task="seq2seq",
        positions=None,
    ),
    "t5-gated": Family(
        "t5",
        ("T5Config", "T5ForConditionalGeneration"),
        {**_T5, "d_ff": 37, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        {**_layers(37, stem="encoder.layers."), **_layers(37, stem="decoder.layers.", layers=3)},
        gated=True,
        activation=(None, "gelu_new"),
        task="seq2seq",
        positions=None,
    ),
    "mt5": Family(
        "mt5",
        ("MT5Config", "MT5ForConditionalGeneration"),
        {**_T5, "d_ff": 37, "decoder_start_token_id": 0},
        {**_layers(37, stem="encoder.layers."), **_layers(37, stem="decoder.layers.")},
        gated=True,
        activation=(None, "gelu_new"),
        task="seq2seq",
        positions=None,
    ),
    "umt5": Family(
        "umt5",
        ("UMT5Config", "UMT5ForConditionalGeneration"),
        {**_T5, "d_ff": 37, "decoder_start_token_id": 0},
        {**_layers(37, stem="encoder.layers."), **_layers(37, stem="decoder.layers.")},
        gated=True,
        activation=(None, "gelu_new"),
        task="seq2seq",
        positions=None,
    ),
    "mixtral": Family(
        "mixtral",
        ("MixtralConfig", "MixtralForCausalLM"),
        _usual(37, **_MOE, num_local_experts=EXPERTS),
        _experts(37),
        gated=True,
        activation=("hidden_act", "silu"),
    ),
    "mixtral-fused": Family(
        "mixtral",
        ("MixtralConfig", "MixtralForCausalLM"),
        _usual(37, **_MOE, num_local_experts=EXPERTS),
        _experts(37),
        gated=True,
        activation=("hidden_act", "silu"),
        fused_on_disk=True,
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
        _usual(
            52,
            **_MOE,
            num_experts=EXPERTS,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=37,
            mlp_only_layers=[0],
        ),
        {"layers.0": 52, **_experts(20, (1,)), "layers.1.shared_expert": 37},
        gated=True,
        activation=("hidden_act", "silu"),
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        _usual(52, **_MOE, head_dim=8, num_experts=EXPERTS, moe_intermediate_size=20, mlp_only_layers=[1]),
        {**_experts(20, (0,)), "layers.1": 52},
        gated=True,
        activation=("hidden_act", "silu"),
    ),
    "qwen3_moe-fused": Family(
        "qwen3_moe",
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        _usual(52, **_MOE, head_dim=8, num_experts=EXPERTS, moe_intermediate_size=20, mlp_only_layers=[1]),
        {**_experts(20, (0,)), "layers.1": 52},
        gated=True,
        activation=("hidden_act", "silu"),
        fused_on_disk=True,
    ),
    "olmoe": Family(
        "olmoe",
        ("OlmoeConfig", "OlmoeForCausalLM"),
        _usual(37, **_MOE, num_experts=EXPERTS, bos_token_id=1, eos_token_id=2),
        _experts(37),
        gated=True,
        activation=("hidden_act", "silu"),
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
        _usual(52, **_DEEPSEEK),
        {"layers.0": 52, **_experts(20, (1,)), "layers.1.shared_experts": 20},
        gated=True,
        activation=("hidden_act", "silu"),
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
        _usual(52, **_DEEPSEEK),
        {"layers.0": 52, **_experts(20, (1,)), "layers.1.shared_experts": 20},
        gated=True,
        activation=("hidden_act", "silu"),
    ),
    "glm4_moe": _moe(
        "glm4_moe",
        "Glm4Moe",
        {"layers.0": 52, **_experts(20, (1,)), "layers.1.shared_experts": 20},
        head_dim=8,
        **_GROUPED,
    ),
    "qwen3_next": _moe(
        "qwen3_next",
        "Qwen3Next",
        {"layers.0": 52, **_experts(20, (1,)), "layers.1.shared_expert": 37},
        head_dim=8,
        num_experts=EXPERTS,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=37,
        mlp_only_layers=[0],
        layer_types=["linear_attention", "full_attention"],
        **_LINEAR_ATTENTION,
    ),
    "phimoe": _moe("phimoe", "Phimoe", _experts(52), num_local_experts=EXPERTS, router_jitter_noise=0.0),
    "minimax": _moe("minimax", "MiniMax", _experts(52), head_dim=8, num_local_experts=EXPERTS, block_size=16),
    "granitemoe": _moe("granitemoe", "GraniteMoe", _experts(52), num_local_experts=EXPERTS),
    "granitemoeshared": _moe(
        "granitemoeshared",
        "GraniteMoeShared",
        _with_shared(52, "shared_mlp", 37),
        num_local_experts=EXPERTS,
        shared_intermediate_size=37,
    ),
    "granitemoehybrid": _moe(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        {f"layers.{layer}.shared_mlp": 37 for layer in range(LAYERS)},
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=37,
        layer_types=["linear_attention", "full_attention"],
        **_MAMBA,
    ),
    "gpt_oss": _moe(
        "gpt_oss",
        "GptOss",
        _experts(52),
        activation_key=None,
        head_dim=8,
        num_local_experts=EXPERTS,
        # So that many values reach the limit of 7, which older versions of transformers do not take from the config.
        initializer_range=2.0,
    ),
    "minimax_m3_vl_text": _moe(
        "minimax_m3_vl_text",
        "MiniMaxM3VL",
        {"layers.0": 37, **_experts(52, (1,)), "layers.1.shared_experts": 20},
        activation_key=None,
        config_class="MiniMaxM3VLTextConfig",
        head_dim=8,
        rotary_dim=8,
        num_local_experts=EXPERTS,
        dense_intermediate_size=37,
        shared_intermediate_size=20,
        mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention", "full_attention"],
        # Many values reach it.
        swiglu_limit=0.75,
    ),
    "deepseek_v4": _moe(
        "deepseek_v4",
        "DeepseekV4",
        _with_shared(52, "shared_experts", 52),
        stripped="model.",
        head_dim=8,
        qk_rope_head_dim=4,
        q_lora_rank=8,
        o_lora_rank=8,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=8,
        hc_mult=2,
        moe_intermediate_size=52,
        n_routed_experts=EXPERTS,
        mlp_layer_types=["moe", "moe"],
        swiglu_limit=0.75,
    ),
    "openai_privacy_filter": Family(
        "openai_privacy_filter",
        ("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel"),
        # The text has few tokens for an encoder: most experts get most of them.
        _usual(
            52,
            num_key_value_heads=1,
            num_experts_per_tok=3,
            initializer_range=2.0,
            head_dim=8,
            num_local_experts=EXPERTS,
        ),
        _experts(52),
        gated=True,
        activation=(None, "silu"),
        task="encoder",
        tokenizer="bert",
    ),
    "nemotron_h": Family(
        "nemotron_h",
        ("NemotronHConfig", "NemotronHForCausalLM"),
        {
            **{key: value for key, value in _usual(52).items() if key != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_key_value_heads": 1,
            "head_dim": 8,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 37,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "chunk_size": 16,
        },
        {**_experts(20, (1,)), "layers.1.shared_experts": 37, "layers.3": 52},
        gated=False,
        activation=("mlp_hidden_act", "relu2"),
    ),
    "lfm2": Family(
        "lfm2",
        ("Lfm2Config", "Lfm2ForCausalLM"),
        _usual(37, num_key_value_heads=1, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
        _layers(37),
        gated=True,
        activation=(None, "silu"),
        ffn="layers.0.feed_forward",
        weights=("model.layers.0.feed_forward.w1", "model.layers.0.feed_forward.w3"),
    ),
    "lfm2_moe": _moe(
        "lfm2_moe",
        "Lfm2Moe",
        {"layers.0": 52, **_experts(20, (1,))},
        activation_key=None,
        num_experts=EXPERTS,
        moe_intermediate_size=20,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
}

# Model types that are found by the names of their tensors; what runs them is code that comes with the checkpoint.
BY_NAME_ONLY = ("minicpm",)
# Model types whose text model is tested alone: the rest needs packages that are not installed for the tests.
BY_TEXT_MODEL = {"gemma3n": "gemma3n_text"}
