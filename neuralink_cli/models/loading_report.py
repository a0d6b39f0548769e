"""What transformers tells of a checkpoint that it loaded: which weights it lacks, do not fit, or are not used."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.inference_names import take_numbers_out
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.errors import InputError

logger = logging.getLogger(__name__)

# What models made from their configs and old versions of transformers saved: no weights.
_BUFFERS = re.compile(r".*(inv_freq|masked_bias|attention\.bias|attn\.bias|position_ids|_extra_state)")
_PART = re.compile(r"\.(weight|bias)$")


def require_loaded(report: Mapping[str, Any], model: Any, architecture: Architecture, directory: Path) -> None:
    """Check that every weight of a model comes from the checkpoint, and every weight of a block is in the model.

    The model must be loaded with `ignore_mismatched_sizes`, so that what does not fit is in the report. Weights of its
    modules that it does not use are logged.

    Args:
        report: What `from_pretrained` gives with `output_loading_info`.

    Raises:
        InputError: A weight is missing or of another shape, or the model does without a weight of an FFN block.
    """
    _require_shapes(report["mismatched_keys"], directory)
    require_all_weights(report["missing_keys"], architecture, directory)
    _tell_unused(report["unexpected_keys"], model, architecture, directory)


def require_all_weights(missing: Iterable[str], architecture: Architecture, directory: Path) -> None:
    """Check that a checkpoint has all weights that its model needs.

    Args:
        missing: Names of the parameters that the checkpoint lacks.

    Raises:
        InputError: A weight is missing that the architecture does not list under `not_in_checkpoint`.
    """
    lacking = sorted(
        name for name in missing if not architecture.bare_name(name).startswith(architecture.not_in_checkpoint)
    )
    if lacking:
        raise InputError(
            f"weight {lacking[0]!r}{_more(lacking)} is missing, so the model would run on random numbers",
            where=directory,
        )


def _require_shapes(mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]], directory: Path) -> None:
    found = sorted((name, list(stored), list(wanted)) for name, stored, wanted in mismatched)
    if found:
        name, stored, wanted = found[0]
        raise InputError(
            f"weight {name!r} has shape {stored}, but the model that {CONFIG_FILE} describes needs {wanted}"
            f"{_more(found)}",
            where=directory,
            fix=f"correct {CONFIG_FILE} (vocab_size, hidden_size and the like), or save the model again",
        )


def _tell_unused(unexpected: Iterable[str], model: Any, architecture: Architecture, directory: Path) -> None:
    parameters = [architecture.bare_name(name) for name, _ in model.named_parameters()]
    layers = {_layer(name) for name in parameters} - {None}
    modules = {name.rpartition(".")[0] for name in parameters}
    # A base model does without its head, and a text model without a vision tower: none of them is in its modules.
    unused = sorted(
        name
        for name in unexpected
        if not _BUFFERS.fullmatch(name)
        and (_layer(bare := architecture.bare_name(name)) in layers or bare.rpartition(".")[0] in modules - {""})
    )
    described = {_PART.sub("", part.weight) for pattern in architecture.blocks for part in pattern.parts.values()}
    of_blocks = [name for name in unused if _pattern(architecture.bare_name(name)) in described]
    if of_blocks:
        raise InputError(
            f"{type(model).__name__} of transformers does without {of_blocks[0]!r}{_more(of_blocks)}, though an FFN "
            "block has it",
            where=directory,
            fix=f"correct {CONFIG_FILE} (mlp_bias and the like), or take what the model does not use out of the files",
        )
    if unused:
        logger.warning(
            "%s: %s of transformers leaves out weight %r%s of its modules; check that %s is right",
            directory,
            type(model).__name__,
            unused[0],
            _more(unused),
            CONFIG_FILE,
        )


def _layer(name: str) -> tuple[str, int] | None:
    """The list of layers and the layer that a tensor is in."""
    taken = take_numbers_out(name)
    return None if taken is None else (taken[0].stack, taken[1].layer)


def _pattern(name: str) -> str:
    """A tensor's name as descriptions have it, without its last step."""
    taken = take_numbers_out(name)
    return "" if taken is None else _PART.sub("", str(taken[0]))


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
