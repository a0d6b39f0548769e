"""Special tokens, as the template of a tokenizer has them and whatever its vocabulary is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from neuralink_cli.calibration.sequences import SequenceOptions, tokenize
from neuralink_cli.calibration.texts import Sample
from neuralink_cli.models.special_tokens import surrounding_tokens

IDS = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3}
LETTERS = {letter: 4 + place for place, letter in enumerate("acgtACGT")}


def template(single: str) -> Any:
    used = [(token, number) for token, number in IDS.items() if token in single.split()]
    return processors.TemplateProcessing(single=single, special_tokens=used)


# What it is called, the post-processor, the opening and the closing tokens.
SHAPES: list[tuple[str, Any, list[int], list[int]]] = [
    ("none", None, [], []),
    ("no special token", processors.ByteLevel(), [], []),
    ("opening", template("<s> $A"), [0], []),
    ("closing", template("$A </s>"), [], [1]),
    ("both", template("<s> $A </s>"), [0], [1]),
    ("two opening, one closing", template("[CLS] <s> $A </s>"), [2, 0], [1]),
    ("bert", processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), [2], [3]),
    ("roberta", processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), [0], [1]),
    ("sequence", processors.Sequence([processors.ByteLevel(), template("<s> $A")]), [0], []),
    ("opening is a letter", processors.TemplateProcessing(single="a $A", special_tokens=[("a", 4)]), [4], []),
]


def tokenizer_of(post_processor: Any, letters: str) -> Any:
    tokenizer = Tokenizer(BPE({**IDS, **{letter: LETTERS[letter] for letter in letters}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("letters", ["acgt", "ACGT"])
@pytest.mark.parametrize(("name", "post_processor", "opening", "closing"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_every_template_with_and_without_the_letter_a(
    name: str, post_processor: Any, opening: list[int], closing: list[int], letters: str
) -> None:
    tokenizer = tokenizer_of(post_processor, letters)
    assert surrounding_tokens(tokenizer) == (opening, closing)
    texts = [letters, letters[:2] + letters[0]]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    for packing in (False, True):
        found = [found.ids.tolist() for found in tokenize(map(Sample, texts), tokenizer, SequenceOptions(100, packing))]
        assert found == (expected if not packing else [expected[0] + expected[1]])


def test_a_tokenizer_that_knows_no_text_still_has_its_template() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_with(Tokenizer(WordLevel({"<s>": 0, "水": 1}, unk_token="<s>")), template("<s> $A"))
    )
    assert surrounding_tokens(tokenizer) == ([0], [])


def _with(tokenizer: Any, post_processor: Any) -> Any:
    tokenizer.post_processor = post_processor
    return tokenizer


class LettersInPython(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer without a backend, as checkpoints bring them along."""

    def __init__(self, **options: Any) -> None:
        self._ids = {"[CLS]": 0, "[SEP]": 1, "C": 2, "G": 3}
        super().__init__(cls_token="[CLS]", sep_token="[SEP]", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **_options: Any) -> list[str]:
        return [letter for letter in text if letter in self._ids]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._ids)[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0, *token_ids_0, 1]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()


def test_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    tokenizer = LettersInPython()
    assert surrounding_tokens(tokenizer) == ([0], [1])
    (found,) = tokenize([Sample("CG")], tokenizer, SequenceOptions(9, packing=True))
    assert found.ids.tolist() == tokenizer("CG")["input_ids"] == [0, 2, 3, 1]
