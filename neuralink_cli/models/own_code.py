"""Checkpoints that come with Python code of their own although transformers has a model of their type.

transformers then runs its own class unless it is told to trust that code, which may compute another function: attention
in both directions, say. Which of the two ran has to be the user's choice, and on record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.files.json_text import read_foreign_object
from neuralink_cli.models.hf_packages import require_hf_packages

_TOKENIZER_CONFIG = "tokenizer_config.json"
OwnCode = Literal["run", "ignored"]


def settle_own_code(
    directory: Path, architecture: Architecture, *, trust: bool = False, ignore: bool = False, may_run: bool = True
) -> OwnCode | None:
    """What becomes of the code that comes with a checkpoint; None if there is none that matters.

    Args:
        trust: Run it.
        ignore: Run what transformers has for the model's type instead.
        may_run: Whether the user could have asked to run it.

    Raises:
        OptionError: Both.
        UnsupportedError: Neither, and there is code that transformers would silently leave out.
    """
    if trust and ignore:
        raise OptionError("--trust-remote-code and --ignore-remote-code contradict each other", fix="drop one of them")
    found = _found(directory, architecture)
    if not found:
        return None
    if trust:
        return "run"
    if ignore:
        return "ignored"
    run = "pass --trust-remote-code to run it, or " if may_run else "pass "
    raise UnsupportedError(
        f"comes with Python code of its own ({', '.join(found)}), which may compute something else than what "
        "transformers has for its type",
        where=directory,
        fix=f"read that code, then {run}--ignore-remote-code to do without it",
    )


def code_model_classes(directory: Path) -> frozenset[str]:
    """The classes of transformers, as `AutoModel`, for which a checkpoint comes with code of its own."""
    return frozenset(_auto_map(directory / CONFIG_FILE)) - {"AutoConfig", "AutoTokenizer"}


def _found(directory: Path, architecture: Architecture) -> list[str]:
    """The code that transformers would leave out without being told to trust it."""
    found = []
    # Where an architecture says what it runs as, that is known to compute the same.
    models = {key: name for key, name in _auto_map(directory / CONFIG_FILE).items() if key != "AutoTokenizer"}
    if models and architecture.runs_as is None and _is_known(directory):
        found += sorted({f"{key}: {_shown(name)}" for key, name in models.items()})
    tokenizers = _auto_map(directory / _TOKENIZER_CONFIG).get("AutoTokenizer")
    if tokenizers and architecture.task != "image-encoder":
        found.append(f"AutoTokenizer: {_shown(tokenizers)}")
    return found


def _is_known(directory: Path) -> bool:
    """Whether transformers has a model of its type; else it says itself that it needs the code."""
    require_hf_packages("transformers")
    from transformers import CONFIG_MAPPING

    return read_foreign_object(directory / CONFIG_FILE).get("model_type") in CONFIG_MAPPING


def _auto_map(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    found = read_foreign_object(path).get("auto_map")
    # An old form has the tokenizer's alone, as a list.
    return found if isinstance(found, dict) else {"AutoTokenizer": found} if found else {}


def _shown(name: object) -> str:
    names = name if isinstance(name, list) else [name]
    return ", ".join(str(one) for one in names if one)[:200]
