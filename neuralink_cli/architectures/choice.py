"""Which architecture a model is taken to have: a user's, one inferred from the model itself, or a built-in one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from neuralink_cli.architectures.architecture import (
    Architecture,
    find_architecture,
    is_built_in,
    parse_architecture,
    read_architecture,
)
from neuralink_cli.architectures.inference import infer_architecture
from neuralink_cli.architectures.model_description import ModelDescription

logger = logging.getLogger(__name__)


def choose_architecture(
    model_type: str, where: Path, override: Path | None = None, infer_from: ModelDescription | None = None
) -> Architecture:
    """The user's architecture file if there is one, else what is inferred if asked for, else the built-in architecture.

    What is inferred is logged, so that it can be reviewed.

    Args:
        infer_from: The model, if its architecture is to be inferred.

    Raises:
        InputError, UnsupportedError: As `read_architecture`, `infer_architecture` and `find_architecture`.
    """
    if override is not None:
        return read_architecture(override)
    if infer_from is None:
        return find_architecture(model_type, where)
    document = infer_architecture(infer_from)
    remark_if_built_in(model_type)
    logger.info(
        "inferred this architecture from names and shapes; please review it:\n%s", json.dumps(document, indent=2)
    )
    return parse_architecture(document, where)


def remark_if_built_in(model_type: str) -> None:
    """Log that nothing needs to be inferred for a `model_type`, if that is so."""
    if is_built_in(model_type):
        logger.info("%r is built in: --infer-architecture is not needed, and may know less", model_type)
