"""How many bytes a bundle will have, from the shape of a block and the formats that its weights are stored in."""

from __future__ import annotations

from neuralink_cli.activations.trace import TraceBlock
from neuralink_cli.errors import OptionError
from neuralink_cli.weight_formats.formats import BLOCK_WEIGHTS, SOURCE, parse_weight_formats, part_bytes


def bundle_bytes_of(block: TraceBlock, weights: str, *, resident: str) -> int:
    """Bytes of a bundle.

    Args:
        weights: Formats as `relayout --weights` takes them.
        resident: "gate" if the rows that decide firing are kept out of the bundles.

    Raises:
        OptionError: `weights` is no format, or has blocks that do not fill the rows.
    """
    formats = parse_weight_formats(weights, "--weights")
    total = 0
    for role, size in block.part_bytes.items():
        if role == block.firing_role and resident == "gate":
            continue
        if formats[role] != SOURCE and block.hidden % BLOCK_WEIGHTS:
            raise OptionError(
                f"{block.id} has rows of {block.hidden:,} weights, {formats[role]} needs a multiple of {BLOCK_WEIGHTS}",
                where="--weights",
            )
        total += part_bytes(formats[role], block.hidden, size // block.hidden)
    return total
