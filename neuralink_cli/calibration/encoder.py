"""Texts of any length as token ids: a long text in pieces, with the tokens that it has as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from neuralink_cli.models.special_tokens import surrounding_tokens, text_tokens

# A text is tokenised in pieces of at most so many characters: time and memory of a tokenizer can grow faster than it.
_PIECE = 1 << 16
# So many characters on either side of a cut say whether the tokens are those of the whole text.
_CONTEXT = 256
# So many places of each kind are tried for a cut.
_TRIES = 8


class Encoder:
    """A tokenizer without its special tokens, and these by themselves."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.opening, self.closing = surrounding_tokens(tokenizer)

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Token ids of texts that continue each other, piece by piece.

        A tokenizer may put a space before whatever it is given, as SentencePiece does. So a piece is tokenised together
        with the end of the piece before it, whose tokens are then left out. A cut is made where they can be told apart.
        """
        context = held = ""
        for text in texts:
            held += text
            start = 0
            while len(held) - start > _PIECE:
                end = self._cut(held, start)
                yield self._encode_after(context, held[start:end])
                context = held[max(end - _CONTEXT, 0) : end]
                start = end
            held = held[start:]
        if held:
            yield self._encode_after(context, held)

    def _encode_after(self, context: str, piece: str) -> list[int]:
        if context:
            before, both = text_tokens(self._tokenizer, context), text_tokens(self._tokenizer, context + piece)
            if both[: len(before)] == before:
                return both[len(before) :]
        return text_tokens(self._tokenizer, piece)

    def _cut(self, text: str, start: int) -> int:
        """The end of the piece from `start`: after a line, before a word or wherever no token lies across it."""
        limit = start + _PIECE
        # The last characters of the text may be joined by others that are not there yet.
        places = list(_places(text, start, limit))
        return next((place for place in places if self._tokens_part_at(text, place)), places[0])

    def _tokens_part_at(self, text: str, place: int) -> bool:
        before = text_tokens(self._tokenizer, text[max(place - _CONTEXT, 0) : place])
        both = text_tokens(self._tokenizer, text[max(place - _CONTEXT, 0) : place + _CONTEXT])
        return both[: len(before)] == before


def _places(text: str, start: int, limit: int) -> Iterator[int]:
    """Where to cut, best first. A word keeps the space before it: that is how tokenizers read it."""
    yield from islice(_found(text, "\n", start, limit, 1), _TRIES)
    yield from islice(_found(text, " ", start, limit, 0), _TRIES)
    yield from range(limit, max(limit - _TRIES, start), -1)


def _found(text: str, wanted: str, start: int, limit: int, offset: int) -> Iterator[int]:
    place = text.rfind(wanted, start, limit)
    while place + offset > start:
        yield place + offset
        place = text.rfind(wanted, start, place)
