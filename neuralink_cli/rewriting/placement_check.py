"""Whether a placement was made for a checkpoint as it is now."""

from __future__ import annotations

from collections.abc import Sequence

from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import MismatchError
from neuralink_cli.placement.placement import Placement


def check_placement(checkpoint: Checkpoint, blocks: Sequence[FFNBlock], placement: Placement) -> None:
    """Check that a placement was made for a checkpoint.

    Raises:
        MismatchError: Fingerprints, blocks or their sizes differ.
    """
    fingerprint = placement.info.model["fingerprint"]
    if fingerprint != checkpoint.fingerprint:
        raise MismatchError(
            f"was made for the model with fingerprint {fingerprint[:12]}, "
            f"but {checkpoint.directory} has {checkpoint.fingerprint[:12]}",
            where=placement.path,
            fix="profile and cluster this checkpoint",
        )
    check_placed_blocks(blocks, placement)


def check_placed_blocks(blocks: Sequence[FFNBlock], placement: Placement) -> None:
    """Check that a placement has the blocks of a checkpoint, with the activations that decided what fires.

    Raises:
        MismatchError: Blocks, their sizes or their activations differ.
    """
    expected = {block.id: block.neurons for block in blocks}
    found = {block.id: block.neurons for block in placement.info.blocks}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise MismatchError(f"does not fit the checkpoint's blocks (first at {differing})", where=placement.path)
    activations = {block.id: block.activation for block in placement.info.blocks}
    for block in blocks:
        if (before := activations[block.id]) != block.activation:
            raise MismatchError(
                f"was made for activation {before!r} in {block.id}, which is {block.activation!r} by now",
                where=placement.path,
                fix="profile and cluster again: config.json or the architecture has changed since",
            )
