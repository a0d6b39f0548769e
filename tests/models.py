"""Tiny seeded transformers models of every supported family, saved the way they come from the hub.

>>> build_model(tmp_path / "opt", "opt", dtype="bfloat16", shards=True)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from neuralink_cli.activations.hf_packages import quiet_transformers

FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "bert", "roberta")
ENCODERS = ("bert", "roberta")
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma")
# FFN neurons: most are no multiple of 8.
NEURONS = {"opt": 52, "llama": 37, "mistral": 52, "qwen2": 40, "qwen3": 37, "gemma": 44, "gpt2": 52, "bert": 37}
NEURONS["roberta"] = 64
HIDDEN = 16
LAYERS = 2
MAX_POSITIONS = 64
VOCABULARY = 320

TEXT = """\
The river rises in the hills above the town and runs past the mill, the church and the old bridge.
Every spring the children of the town let paper boats go from the bridge and run along the bank to see them land.
"Which one is mine?" asked the smallest of them. "The one that sank," said her brother, and laughed.

In the evening, when the wheel of the mill stood still, one could hear the water over the stones, the bells at nine,
and far away a train: 1, 2, 3 wagons, then nothing. It is not known who built the bridge, nor why it has seven arches.
The miller counted them twice a day; there were always seven, and he was always glad.
"""


def build_model(
    directory: Path,
    family: str,
    *,
    dtype: str = "float32",
    shards: bool = False,
    seed: int = 0,
    activation: str | None = None,
) -> Path:
    """Save a random model of a family with its tokenizer into `directory` and return it.

    Args:
        dtype: "float32", "float16" or "bfloat16".
        shards: Split the weights into several files with an index.
        activation: Instead of the family's own.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family, activation)
        for name, parameter in model.named_parameters():
            # transformers starts biases at zero, and weights so small that everything is nearly linear.
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    with quiet_transformers():
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="16KB" if shards else "1GB")
        _tokenizer(family).save_pretrained(directory)
    return directory


def _model(family: str, activation: str | None) -> Any:
    import transformers as hf

    neurons = NEURONS[family]
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "tie_word_embeddings": False}
    usual = {
        **common,
        "hidden_size": HIDDEN,
        "intermediate_size": neurons,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    hidden_act = {} if activation is None else {"hidden_act": activation}
    match family:
        case "opt":
            config = hf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                word_embed_proj_dim=HIDDEN,
                ffn_dim=neurons,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                max_position_embeddings=MAX_POSITIONS,
                init_std=0.2,
                bos_token_id=1,
                eos_token_id=1,
                pad_token_id=0,
                activation_function=activation or "relu",
            )
            return hf.OPTForCausalLM(config)
        case "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**usual, **hidden_act, num_key_value_heads=1))
        case "mistral":
            return hf.MistralForCausalLM(hf.MistralConfig(**usual, **hidden_act, num_key_value_heads=1))
        case "qwen2":
            return hf.Qwen2ForCausalLM(hf.Qwen2Config(**usual, **hidden_act, num_key_value_heads=1))
        case "qwen3":
            return hf.Qwen3ForCausalLM(hf.Qwen3Config(**usual, **hidden_act, num_key_value_heads=1, head_dim=8))
        case "gemma":
            tied = {**usual, "tie_word_embeddings": True}
            return hf.GemmaForCausalLM(
                hf.GemmaConfig(**tied, hidden_act=activation or "gelu_pytorch_tanh", num_key_value_heads=1, head_dim=8)
            )
        case "gpt2":
            config = hf.GPT2Config(
                vocab_size=VOCABULARY,
                initializer_range=0.2,
                n_embd=HIDDEN,
                n_inner=neurons,
                n_layer=LAYERS,
                n_head=2,
                n_positions=MAX_POSITIONS,
                bos_token_id=0,
                eos_token_id=0,
                activation_function=activation or "gelu_new",
            )
            return hf.GPT2LMHeadModel(config)
        case "bert":
            # With a prefix before every name and without the pooler that AutoModel would like to have.
            return hf.BertForMaskedLM(hf.BertConfig(**usual, **hidden_act, pad_token_id=0))
        case "roberta":
            # Without a prefix and with a pooler; positions are counted from the padding index + 1.
            config = hf.RobertaConfig(
                **{**usual, "max_position_embeddings": MAX_POSITIONS + 2},
                **hidden_act,
                bos_token_id=0,
                pad_token_id=1,
                eos_token_id=2,
            )
            return hf.RobertaModel(config)
        case _:
            raise ValueError(f"no such family: {family}")


def _tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE, WordPiece
    from transformers import PreTrainedTokenizerFast

    specials, names, template = _SPECIAL_TOKENS.get(family, _SPECIAL_TOKENS["llama"])
    if family == "bert":
        # The trainer for this kind breaks ties at random, so its vocabulary is made by hand.
        words = sorted({word.lower() for word in re.findall(r"\w+", TEXT)})
        letters = sorted({letter.lower() for letter in TEXT if not letter.isspace()})
        vocabulary = [*specials, *letters, *("##" + letter for letter in letters), *(w for w in words if len(w) > 1)]
        tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(specials)
    else:
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([TEXT], trainer)
    if template is not None:
        used = [(token, specials.index(token)) for token in specials if token in template.split()]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if family == "qwen2":
        wrapped.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}"
        )
    return wrapped


_LLAMA_NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_GPT_NAMES = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
# By family: the special tokens in order of their ids, what they are called, and how they surround a text.
_SPECIAL_TOKENS: dict[str, tuple[list[str], dict[str, str], str | None]] = {
    "llama": (["<pad>", "<s>", "</s>"], _LLAMA_NAMES, "<s> $A"),
    "opt": (
        ["<pad>", "</s>", "<unk>"],
        {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "</s> $A",
    ),
    "gpt2": (["<|endoftext|>"], _GPT_NAMES, None),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], _GPT_NAMES, None),
    "qwen3": (["<|endoftext|>"], _GPT_NAMES, None),
    "bert": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "[CLS] $A [SEP]",
    ),
    "roberta": (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        {
            "bos_token": "<s>",
            "cls_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
        "<s> $A </s>",
    ),
}
