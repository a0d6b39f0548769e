"""The tokenizer of a checkpoint. Needs transformers, but no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError, first_line


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local checkpoint.

    Raises:
        InputError: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise load_error("tokenizer", directory, error) from error
    # Without its files transformers may make one up that knows no text.
    own_files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    if own_files and not any((directory / name).is_file() for name in own_files | {"tokenizer.json"}):
        raise InputError("has no tokenizer (tokenizer.json)", where=directory)
    return tokenizer


def require_known_tokens(ids: Any, vocabulary: int, where: str | os.PathLike[str] | None = None) -> None:
    """Check that a model has embeddings for token ids, an array or a sequence that is not empty.

    Raises:
        InputError: It has none for the greatest.
    """
    greatest = int(max(ids))
    if greatest >= vocabulary:
        raise InputError(
            f"the tokenizer makes token {greatest} of it, the model has only {vocabulary}",
            where=where,
            fix="use the tokenizer that belongs to the model",
        )


def load_error(thing: str, directory: Path, error: Exception) -> NeuralinkError:
    """What to tell the user when transformers could not load a `thing` of the checkpoint in `directory`."""
    message = first_line(error)
    if "trust_remote_code" in str(error):
        return UnsupportedError(
            f"its {thing} needs Python code that comes with the checkpoint",
            where=directory,
            fix="read that code, then pass --trust-remote-code to run it",
        )
    return InputError(f"transformers cannot load its {thing} ({message})", where=directory)
