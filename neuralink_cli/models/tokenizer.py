"""The tokenizer of a checkpoint. Needs transformers, but no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.contents import refuse_dangling_link
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError, first_line
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.files.lfs import refuse_lfs_pointer

# What the files of a tokenizer are called, of whatever kind it is.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = (
    *("tokenizer.json", *_SETTINGS),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
)
_VOCABULARY = re.compile(r"tok|vocab|merges|spiece|sentencepiece|\.(model|bpe|spm)$", re.IGNORECASE)


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local checkpoint.

    Raises:
        InputError: There is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    _require_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise (
            _config_error(directory, trust_remote_code)
            or _no_vocabulary(directory, error)
            or load_error("tokenizer", directory, error)
        ) from error
    # Without tokenizer files, transformers may make up a tokenizer that knows no text.
    own_files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    if own_files and not any((directory / name).is_file() for name in own_files | {"tokenizer.json"}):
        raise _no_tokenizer(directory)
    return tokenizer


def _no_vocabulary(directory: Path, error: Exception) -> InputError | None:
    """The error if there is nothing that a tokenizer could know its tokens from, and none of its own code is needed."""
    names = (path.name for path in directory.iterdir() if path.name not in _SETTINGS)
    if "trust_remote_code" in str(error) or any(_VOCABULARY.search(name) for name in names):
        return None
    return _no_tokenizer(directory)


def _no_tokenizer(directory: Path) -> InputError:
    return InputError(
        "has no tokenizer (tokenizer.json)",
        where=directory,
        fix="put the files of the tokenizer that the model was trained with beside it",
    )


def _require_files(directory: Path) -> None:
    """Check that the files of a tokenizer which are there have content: transformers would not say what is wrong."""
    for name in _FILES:
        refuse_dangling_link(directory / name)
        refuse_lfs_pointer(directory / name)


def _config_error(directory: Path, trust_remote_code: bool) -> NeuralinkError | None:
    """What is wrong with config.json, which a tokenizer is chosen by, if that is what transformers fails at."""
    from transformers import CONFIG_MAPPING, AutoConfig

    config = read_foreign_object(directory / CONFIG_FILE)
    if config.get("model_type") not in CONFIG_MAPPING:
        # A model that runs as another, or with code of its own: transformers need not know it.
        return None
    try:
        AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        return load_error(CONFIG_FILE, directory, error)
    return None


def load_error(thing: str, directory: Path, error: Exception) -> NeuralinkError:
    """The error if transformers cannot load a `thing` of the checkpoint in `directory`."""
    message = first_line(error)
    if "trust_remote_code" in str(error):
        return UnsupportedError(
            f"its {thing} needs Python code that comes with the checkpoint",
            where=directory,
            fix="read that code, then pass --trust-remote-code to run it",
        )
    return InputError(f"transformers cannot load its {thing} ({message})", where=directory)
