"""Chooses the architecture of a model: from a user's file, inferred from the model, or built in."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.architectures.architecture import (
    Architecture,
    is_built_in,
    parse_architecture,
    read_architecture,
)
from neuralink_cli.architectures.inference import infer_architecture
from neuralink_cli.architectures.nearest import require_known
from neuralink_cli.checkpoint.model_description import ModelDescription
from neuralink_cli.errors import OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArchitectureChoice:
    """Where the description of a model's FFN blocks comes from. The default is a built-in description.

    Attributes:
        file: JSON description of an architecture that is not built in.
        infer: Infer it from the names and shapes of the model's tensors.

    Raises:
        OptionError: Both are given.
    """

    file: Path | None = None
    infer: bool = False

    def __post_init__(self) -> None:
        if self.file is not None and self.infer:
            raise OptionError(
                "--architecture and --infer-architecture both choose the architecture", fix="drop one of them"
            )


BUILT_IN = ArchitectureChoice()


def choose_architecture(model: ModelDescription, choice: ArchitectureChoice = BUILT_IN) -> Architecture:
    """The architecture of a model, from the source that `choice` names.

    An inferred architecture is logged for review.

    Raises:
        InputError, UnsupportedError: As `read_architecture`, `infer_architecture` and `require_known`.
    """
    if choice.file is not None:
        return read_architecture(choice.file)
    model_type = str(model.config.get("model_type"))
    if not choice.infer:
        return require_known(model)
    document = infer_architecture(model)
    remark_if_built_in(model_type)
    logger.info(
        "inferred this architecture from names and shapes; please review it:\n%s", json.dumps(document, indent=2)
    )
    return parse_architecture(document, model.where)


def remark_if_built_in(model_type: str) -> None:
    """If the architecture of a `model_type` is built in, log that it need not be inferred."""
    if is_built_in(model_type):
        logger.info("%r is built in: --infer-architecture is not needed, and may know less", model_type)
