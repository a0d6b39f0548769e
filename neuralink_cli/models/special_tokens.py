"""The special tokens that a tokenizer puts around a text by itself. Needs tokenizers, but no torch."""

from __future__ import annotations

from typing import Any

# The only word of a vocabulary made for the purpose, so it is no real token's text.
_WORD = "x"
# Stands for the tokens of a text; no token has a negative id.
_MARK = -1


def surrounding_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer adds before and after the tokens of a text.

    The tokenizer's own template is asked, never a text: a text may have no tokens in its vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _of_post_processor(backend.post_processor)
    ids = [int(token) for token in tokenizer.build_inputs_with_special_tokens([_MARK])]
    place = ids.index(_MARK)
    return ids[:place], ids[place + 1 :]


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text alone, without any special tokens around it."""
    # `verbose` is about texts longer than the model takes: they are cut later.
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return [int(token) for token in ids]


def _of_post_processor(post_processor: Any) -> tuple[list[int], list[int]]:
    if post_processor is None:
        return [], []
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    carrier = Tokenizer(WordLevel({_WORD: 0}, unk_token=_WORD))
    carrier.post_processor = post_processor
    encoding = carrier.encode(_WORD)
    # A token of the text belongs to sequence 0, a special token to none.
    place = encoding.sequence_ids.index(0)
    return list(encoding.ids[:place]), list(encoding.ids[place + 1 :])
