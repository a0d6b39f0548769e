"""A random model of the Llama shape whose neurons fire in planted clusters, as a checkpoint and as a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]

CLUSTER = 64
# Share of a gate row that its cluster has in common, so that about half of a cluster fires with one of its neurons.
COMMON = 0.8


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    hidden: int
    layers: int
    neurons: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.key_heads * self.head
        block = 3 * self.hidden * self.neurons
        return self.layers * (attention + block + 2 * self.hidden) + (2 * self.vocabulary + 1) * self.hidden


SHAPES = {
    "tiny": Shape(256, 4, 1024, 4, 2, 2048),
    "1B": Shape(2048, 16, 8192, 32, 8, 32000),
    "7B": Shape(4096, 32, 11008, 32, 32, 32000),
}


def tensors(shape: Shape, layer: int | None) -> dict[str, Weights]:
    """The weights of a layer, or those outside of layers, by their names in transformers."""
    rng = np.random.default_rng([7, 0 if layer is None else layer + 1])

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Weights:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale / np.sqrt(columns))

    hidden = shape.hidden
    if layer is None:
        return {
            "model.embed_tokens.weight": matrix(shape.vocabulary, hidden, np.sqrt(hidden)),
            "model.norm.weight": np.ones(hidden, np.float32),
            "lm_head.weight": matrix(shape.vocabulary, hidden),
        }
    clusters = shape.neurons // CLUSTER
    of_neuron = rng.permutation(np.repeat(np.arange(clusters), CLUSTER))
    gate = np.sqrt(COMMON) * matrix(clusters, hidden)[of_neuron] + np.sqrt(1 - COMMON) * matrix(shape.neurons, hidden)
    prefix = f"model.layers.{layer}."
    keys = shape.key_heads * shape.head
    # What a layer adds is small beside what it gets, so that tokens stay different from each other.
    return {
        f"{prefix}self_attn.q_proj.weight": matrix(hidden, hidden),
        f"{prefix}self_attn.k_proj.weight": matrix(keys, hidden),
        f"{prefix}self_attn.v_proj.weight": matrix(keys, hidden),
        f"{prefix}self_attn.o_proj.weight": matrix(hidden, hidden, 0.3),
        f"{prefix}mlp.gate_proj.weight": gate.astype(np.float32),
        f"{prefix}mlp.up_proj.weight": matrix(shape.neurons, hidden),
        f"{prefix}mlp.down_proj.weight": matrix(hidden, shape.neurons, 0.5),
        f"{prefix}input_layernorm.weight": np.ones(hidden, np.float32),
        f"{prefix}post_attention_layernorm.weight": np.ones(hidden, np.float32),
    }


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """A checkpoint in float16, one file a layer, with a tokenizer of numbered words."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for layer in (None, *range(shape.layers)):
        file = f"model-{'outside' if layer is None else f'{layer:03}'}.safetensors"
        found = {name: weights.astype(np.float16) for name, weights in tensors(shape, layer).items()}
        save_file(found, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(found, file)
    index = {"metadata": {"total_size": 2 * shape.weights}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.neurons,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(shape.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def random_text(shape: Shape, tokens: int, seed: int) -> str:
    """Words of the tokenizer, drawn at random."""
    words = np.random.default_rng(seed).integers(1, shape.vocabulary, tokens)
    return " ".join(f"w{word}" for word in words)


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def write_gguf(path: Path, shape: Shape, weights: str) -> None:
    """The same model for llama.cpp, all matrices in one format.

    Args:
        weights: "f16", "q8_0" or "q4_0".
    """
    import gguf

    kind = gguf.GGMLQuantizationType[weights.upper()]
    writer = gguf.GGUFWriter(str(path), "llama", use_temp_file=True)
    writer.add_block_count(shape.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.neurons)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type({"f16": 1, "q4_0": 2, "q8_0": 7}[weights])
    _add_vocabulary(writer, shape.vocabulary)
    for layer in (None, *range(shape.layers)):
        for name, values in tensors(shape, layer).items():
            short = name if layer is None else name.removeprefix(f"model.layers.{layer}.")
            target = _GGUF_NAMES[short] if layer is None else f"blk.{layer}.{_GGUF_NAMES[short]}"
            # llama.cpp keeps the two halves that a rotation mixes side by side.
            if short.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                values = values.reshape(-1, 2, shape.head // 2, shape.hidden).swapaxes(1, 2).reshape(values.shape)
            if values.ndim == 1:
                writer.add_tensor(target, values)
            elif weights == "f16":
                writer.add_tensor(target, values.astype(np.float16))
            else:
                rounded = gguf.quants.quantize(values.astype(np.float16).astype(np.float32), kind)
                writer.add_tensor(target, rounded, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, size: int) -> None:
    """Numbered words, as a SentencePiece vocabulary with the bytes that it must have."""
    control = ["<unk>", "<s>", "</s>"]
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    words = [f"\u2581w{k}" for k in range(len(pieces), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*pieces, *words])
    writer.add_token_scores([0.0] * len(pieces) + [-float(k) for k in range(len(words))])
    writer.add_token_types([*kinds, *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
