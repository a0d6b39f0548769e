"""A checkpoint without its weights: its config, and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError


@dataclass(frozen=True)
class ModelDescription:
    """A model without its weights: its directory, its config, and the shapes of its tensors by name."""

    where: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def refusal(self, what: str) -> UnsupportedError:
        """The error for an architecture that cannot be inferred."""
        return UnsupportedError(
            f"its architecture cannot be inferred: {what}",
            where=self.where,
            fix="describe it in a JSON file (docs/architectures.md) for --architecture",
        )


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe a checkpoint without its weights, and without the scales of those that have some."""
    scales = checkpoint.scales
    shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items() if name not in scales}
    return ModelDescription(checkpoint.directory, checkpoint.config, shapes)
