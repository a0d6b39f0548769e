"""The FFN blocks of a checkpoint, after everything that would make work with them wrong has been refused."""

from __future__ import annotations

from dataclasses import dataclass

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice, choose_architecture
from neuralink_cli.architectures.coverage import Coverage, require_coverage
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.scales import refuse_scaled_blocks, refuse_scales
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import ModelDescription, describe


@dataclass(frozen=True)
class WorkableBlocks:
    """The blocks of a checkpoint, and how they were found."""

    description: ModelDescription
    architecture: Architecture
    blocks: tuple[FFNBlock, ...]
    coverage: Coverage


def find_workable_blocks(
    checkpoint: Checkpoint, choice: ArchitectureChoice = BUILT_IN, *, allow_uncovered: bool = False
) -> WorkableBlocks:
    """Find the blocks of a checkpoint, all weights of which are numbers that are understood.

    Args:
        allow_uncovered: Go on though there are FFNs that no block covers.

    Raises:
        InputError, UnsupportedError: As `choose_architecture`, `find_blocks`, `require_coverage` and the checks for
            scales.
    """
    description = describe(checkpoint)
    refuse_scales(checkpoint)
    architecture = choose_architecture(description, choice)
    blocks = find_blocks(checkpoint, architecture)
    refuse_scaled_blocks(checkpoint, blocks)
    coverage = require_coverage(checkpoint, blocks, allow_uncovered=allow_uncovered)
    return WorkableBlocks(description, architecture, blocks, coverage)
