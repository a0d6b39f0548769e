"""Long texts have the tokens that they have as a whole, wherever they are cut."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from neuralink_cli.calibration import encoder as module
from neuralink_cli.calibration.encoder import Encoder
from tests.tiny_models import TEXT

CHINESE = "河水从镇子上方的山丘流下来,经过磨坊、教堂和古老的桥。每年春天,孩子们都会从桥上放下纸船。"


def sentence_piece_bpe(**options: Any) -> Any:
    """As Llama's: the space before a text is put there by the normalizer, and the whole text is one word."""
    tokenizer = Tokenizer(BPE(**options))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace(scheme: str) -> Any:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


def byte_level(*, prefix: bool) -> Any:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return tokenizer


def trained(tokenizer: Any) -> Any:
    # Words for the trainer, as a text without spaces would be one: the model is then used without a pre-tokenizer.
    words = ["▁" + word for word in TEXT.split()] + list(CHINESE)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=sorted({*TEXT, *CHINESE, "▁"}))
    tokenizer.train_from_iterator(words * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unigram() -> Any:
    letters = sorted({*TEXT, *CHINESE, "▁"})
    pieces = [*((letter, -8.0) for letter in letters), ("▁the", -2.0), ("▁and", -2.5), ("ing", -3.0), ("▁t", -4.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "prepend": lambda: trained(sentence_piece_bpe()),
    "metaspace always": lambda: trained(metaspace("always")),
    "metaspace first": lambda: trained(metaspace("first")),
    "metaspace never": lambda: trained(metaspace("never")),
    "byte level with a prefix": lambda: trained(byte_level(prefix=True)),
    "byte level": lambda: trained(byte_level(prefix=False)),
    "unigram": unigram,
}
TEXTS = {
    "lines": TEXT * 2,
    "one line": (TEXT * 2).replace("\n", " "),
    "double spaces": TEXT.replace(" ", "  "),
    "no spaces": CHINESE * 12,
    "one letter": "a" * 800,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[kind]()
    monkeypatch.setattr(module, "_CONTEXT", 40)
    for name, text in TEXTS.items():
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        for piece in (150, 151, 157):
            monkeypatch.setattr(module, "_PIECE", piece)
            pieces = list(Encoder(tokenizer).encode([text]))
            assert len(pieces) > 2
            # Letters that are all the same are merged from the left, all the way: no short piece can know how far.
            if name != "one letter":
                assert list(chain(*pieces)) == expected, (name, piece)
            assert list(Encoder(tokenizer).encode(text)) == pieces or name == "one letter"


def test_cuts_are_few_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 100)
    tokenizer = TOKENIZERS["byte level"]()
    random = np.random.default_rng(0)
    text = "".join(random.choice(list("abc \n"), 3000))
    pieces = list(Encoder(tokenizer).encode(text.splitlines(keepends=True)))
    assert tokenizer.decode(list(chain(*pieces))) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert len(pieces) < 80
    assert list(Encoder(tokenizer).encode([""])) == list(Encoder(tokenizer).encode([])) == []
