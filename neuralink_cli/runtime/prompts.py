"""The tokens of a prompt. Imports no torch."""

from __future__ import annotations

from typing import Any

from neuralink_cli.errors import InputError, OptionError
from neuralink_cli.files.text_files import unreadable_text
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.special_tokens import surrounding_tokens, text_tokens
from neuralink_cli.sparse_models.settings import GenerationOptions


def prompt_tokens(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """The tokens of a prompt, with what the tokenizer puts before a text but not with what it puts behind one.

    A closing token would tell the model that the text is over.

    Raises:
        InputError: The prompt has no tokens, or it is not Unicode text.
    """
    prompt = prompt.removeprefix("\ufeff")
    problem = unreadable_text(prompt)
    if problem is not None:
        raise InputError(f"the prompt {problem}")
    with quiet_transformers():
        opening, _closing = surrounding_tokens(tokenizer)
        tokens = (*opening, *text_tokens(tokenizer, prompt))
    if not tokens:
        raise InputError("the prompt has no tokens")
    return tokens


def require_room(tokens: tuple[int, ...], options: GenerationOptions, limit: int | None) -> None:
    """Check that a model with so many positions (None: no limit) has some for the prompt and the new tokens.

    Raises:
        OptionError: It has not.
    """
    if limit is None or len(tokens) + options.max_new_tokens <= limit:
        return
    room = limit - len(tokens)
    raise OptionError(
        f"{len(tokens)} prompt tokens and {options.max_new_tokens} new tokens are more than the {limit} positions "
        "of the model",
        fix=f"pass --max-new-tokens {room}" if room > 0 else "shorten the prompt",
    )
