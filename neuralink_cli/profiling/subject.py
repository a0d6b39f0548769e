"""The model that is profiled, as its checkpoint describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from neuralink_cli.activations.options import ProfileOptions
from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.architectures.workable_blocks import find_workable_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.checkpoint.origin import Origin


@dataclass(frozen=True)
class Subject:
    """The model that is profiled, as its checkpoint describes it.

    Attributes:
        name: The model as the user wrote it.
        shapes: The shapes of all tensors.
        code: What becomes of the code that comes with the checkpoint: "run", "ignored", or None if there is none.
    """

    name: str
    directory: Path
    origin: Origin | None
    identity: Mapping[str, str]
    architecture: Architecture
    blocks: tuple[FFNBlock, ...]
    shapes: Mapping[str, tuple[int, ...]]
    coverage: Coverage
    code: str | None = None

    @property
    def stated_identity(self) -> Mapping[str, str]:
        """What the trace says of the model: also what ran, where that was not the only possibility."""
        return self.identity if self.code is None else {**self.identity, "code": self.code}


def read_subject(model: str | Path, options: ProfileOptions) -> Subject:
    """Read what the checkpoint says of a model.

    Raises:
        InputError, UnsupportedError: It cannot be profiled.
        OptionError: It comes with code of its own, and nothing is said about that.
    """
    source = find_model(model, options.revision)
    with Checkpoint(source.directory, source.origin) as checkpoint:
        found = find_workable_blocks(checkpoint, options.architecture, allow_uncovered=options.allow_uncovered)
        identity = {
            "fingerprint": checkpoint.fingerprint,
            "model_type": checkpoint.model_type,
            "architecture": found.architecture.name,
        }
        subject = Subject(
            name=str(model),
            directory=checkpoint.directory,
            origin=checkpoint.origin,
            identity=identity,
            architecture=found.architecture,
            blocks=found.blocks,
            shapes=found.description.shapes,
            coverage=found.coverage,
        )
    return replace(subject, code=_settle_own_code(subject, options))


def _settle_own_code(subject: Subject, options: ProfileOptions) -> str | None:
    from neuralink_cli.models.own_code import settle_own_code

    execution = options.execution
    return settle_own_code(
        subject.directory,
        subject.architecture,
        trust=execution.trust_remote_code,
        ignore=execution.ignore_remote_code,
    )
