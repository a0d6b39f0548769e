"""Prompts as tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from neuralink_cli.errors import InputError
from neuralink_cli.models.tokenizer import load_tokenizer
from neuralink_cli.runtime.generation import encode_prompt
from neuralink_cli.sparse_models.settings import GenerationOptions
from tests.conftest import ModelFactory

EMBEDDINGS = SimpleNamespace(weight=np.zeros((400, 1)))
MODEL = SimpleNamespace(
    config=LlamaConfig(max_position_embeddings=64), named_modules=list, get_input_embeddings=lambda: EMBEDDINGS
)
OPTIONS = GenerationOptions(max_new_tokens=4)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    return list(encode_prompt(MODEL, tokenizer, prompt, OPTIONS))


@pytest.mark.parametrize(("family", "before", "after"), [("llama", 1, 0), ("gpt2", 0, 0), ("bert", 1, 1)])
def test_no_closing_token_stands_behind_a_prompt(model: ModelFactory, family: str, before: int, after: int) -> None:
    tokenizer = load_tokenizer(model(family))
    whole = tokenizer("the river runs")["input_ids"]
    found = encode(tokenizer, "the river runs")
    assert found == whole[: len(whole) - after]
    assert found[before:] == tokenizer("the river runs", add_special_tokens=False)["input_ids"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(model: ModelFactory) -> None:
    tokenizer = load_tokenizer(model("llama"))
    assert encode(tokenizer, "\ufeffthe river") == encode(tokenizer, "the river")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a\udcff", r"the prompt is not UTF-8 text \(byte 0xff\)"),
        ("a\ud800b", r"the prompt is not Unicode text \(it has half of a character, \\ud800\)"),
        ("", "the prompt has no tokens"),
    ],
)
def test_prompts_that_are_no_text(model: ModelFactory, prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(load_tokenizer(model("gpt2")), prompt)


def test_a_token_beyond_the_embeddings_is_named(model: ModelFactory) -> None:
    tokenizer = load_tokenizer(model("gpt2"))
    tokenizer.add_tokens(["<new>"] + [f"<new {number}>" for number in range(100)])
    with pytest.raises(
        InputError, match=r"the prompt: the tokenizer turns it into token 4\d\d, but the model has only 400"
    ):
        encode(tokenizer, "a <new 99>")
