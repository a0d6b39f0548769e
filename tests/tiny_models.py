"""Tiny seeded transformers models of every supported family, saved the way they come from the hub.

>>> build_model(tmp_path / "opt", "opt", dtype="bfloat16", shards=True)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuralink_cli.models.hf_packages import quiet_transformers
from tests.families import FAMILY, VOCABULARY, Family
from tests.families import HIDDEN as HIDDEN
from tests.families import LAYERS as LAYERS
from tests.families import MAX_POSITIONS as MAX_POSITIONS

FAMILIES = tuple(FAMILY)
ENCODERS = tuple(name for name, family in FAMILY.items() if family.task == "encoder")
GATED = tuple(name for name, family in FAMILY.items() if family.gated)
# Families whose blocks all run on every token of a text, with a matrix to each part: those with a simple oracle.
PLAIN = tuple(name for name, family in FAMILY.items() if family.weights is not None and family.task != "image-encoder")
# Of the first block; most are no multiple of 8.
NEURONS = {name: next(iter(family.neurons.values())) for name, family in FAMILY.items()}

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
    sizes: Mapping[str, Any] | None = None,
) -> Path:
    """Save a random model of a family with its tokenizer into `directory` and return it.

    Args:
        dtype: "float32", "float16" or "bfloat16".
        shards: Split the weights into several files with an index.
        activation: Instead of the family's own.
        sizes: Instead of the family's own options, `{"hidden_size": 64}`.
    """
    import torch

    known = FAMILY[family] if sizes is None else replace(FAMILY[family], options={**FAMILY[family].options, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(known, activation)
        for name, parameter in model.named_parameters():
            # transformers starts biases at zero, and weights so small that everything is nearly linear.
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    with quiet_transformers():
        model.to(getattr(torch, dtype)).save_pretrained(
            directory, max_shard_size="16KB" if shards else "1GB", save_original_format=not known.fused_on_disk
        )
        if known.stripped:
            _strip(directory, known.stripped)
        if known.task == "image-encoder":
            _write_image_processor(directory)
        else:
            tokenizer_of(known.tokenizer).save_pretrained(directory)
    if known.renamed is not None:
        _rename(directory, known)
    return directory


def write_images(folder: Path, count: int = 12) -> Path:
    """A folder of small pictures."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for k in range(count):
        coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(np.kron(coarse, np.ones((9, 9, 1), dtype=np.uint8))).save(folder / f"{k:02}.png")
    return folder


def _model(family: Family, activation: str | None) -> Any:
    import transformers as hf

    config_class, model_class = family.classes
    options = dict(family.options)
    key, own = family.activation
    if key is not None:
        # FATReLU is not known to transformers.
        options[key] = activation or ("relu" if own == "fatrelu" else own)
    return getattr(hf, model_class)(getattr(hf, config_class)(**options))


def _strip(directory: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    for path in directory.glob("*.safetensors"):
        save_file({name.removeprefix(prefix): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    for path in directory.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {name.removeprefix(prefix): shard for name, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index))


def _rename(directory: Path, family: Family) -> None:
    """Make it a checkpoint that comes with code of its own, which would say so if it were run."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    name = str(family.renamed)
    config |= {"model_type": name, "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}, **family.config}
    config[str(family.activation[0])] = family.activation[1]
    path.write_text(json.dumps(config))
    (directory / "own.py").write_text('raise RuntimeError("code of the checkpoint was run")\n')


def _write_image_processor(directory: Path) -> None:
    document = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(document))


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of one of the kinds in `_SPECIAL_TOKENS`, trained on `TEXT`."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE, WordPiece
    from transformers import PreTrainedTokenizerFast

    specials, names, template = _SPECIAL_TOKENS[kind]
    if kind == "bert":
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
    if kind == "qwen2":
        wrapped.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}"
        )
    return wrapped


_LLAMA_NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_GPT_NAMES = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
# By kind: the special tokens in order of their ids, what they are called, and how they surround a text.
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
