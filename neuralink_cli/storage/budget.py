"""How much DRAM the cache may take, and how it is shared between blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from neuralink_cli.errors import OptionError
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.sizes import parse_size

_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True)
class DramBudget:
    """DRAM for bundles: `bytes`, or `fraction` of all bundles; the other is None."""

    bytes: int | None = None
    fraction: float | None = None

    def bytes_of(self, total: int) -> int:
        """The budget in bytes if all bundles have `total` bytes; never more than `total`."""
        wanted = self.bytes if self.bytes is not None else math.ceil((self.fraction or 0.0) * total)
        return min(wanted, total)


def parse_budget(text: str) -> DramBudget:
    """Parse a budget as users write it: `5%`, `64MB`, `1.5GiB`, or a number of bytes.

    Raises:
        OptionError: The text is none of these, or a share above 100 %.
    """
    match = _PERCENT.fullmatch(text.strip())
    if match is not None:
        fraction = float(match[1]) / 100
        if fraction > 1:
            raise OptionError(f"{text!r} is more than all bundles", fix="pass at most 100%, or an amount like 64MB")
        return DramBudget(fraction=fraction)
    return DramBudget(bytes=parse_size(text, examples="20%, 64MB or 1.5GiB"))


def split_budget(budget: DramBudget, blocks: Sequence[FlashBlock]) -> tuple[int, ...]:
    """Bundles that each block may keep in DRAM, pinned ones included: the same share of every block.

    Raises:
        OptionError: A block could not keep its pinned neurons, or none at all.
    """
    strides = [block.stride for block in blocks]
    neurons = [block.neurons for block in blocks]
    return split_bundles(budget, neurons, strides, [block.pinned for block in blocks])


def split_bundles(
    budget: DramBudget, neurons: Sequence[int], strides: Sequence[int], pinned: Sequence[int]
) -> tuple[int, ...]:
    """As `split_budget`, from the neurons, bytes of a bundle, and pinned neurons of each block.

    A budget of 0 means no cache: 0 for every block. A block whose share holds just its pinned neurons gets one bundle
    more, which the cache needs.

    Raises:
        OptionError: As `split_budget`.
    """
    total = sum(count * stride for count, stride in zip(neurons, strides, strict=True))
    available = budget.bytes_of(total)
    if available == 0 and not budget.bytes and not budget.fraction:
        return (0,) * len(neurons)
    least = [min(hot + 1, count) for hot, count in zip(pinned, neurons, strict=True)]
    # Shares are rounded to bundles: room for the pinned neurons is room enough, so that 5% holds 5% pinned.
    bounds = [needed - (hot > 0) for hot, needed in zip(pinned, least, strict=True)]
    if any(count * available < bound * total for count, bound in zip(neurons, bounds, strict=True)):
        # The smallest share that gives every block its minimum.
        minimum = max(-(-bound * total // count) for bound, count in zip(bounds, neurons, strict=True))
        raise OptionError(
            f"{available:,} bytes of DRAM are too few for this layout",
            fix=f"allow at least {minimum:,} bytes ({math.ceil(1000 * minimum / total) / 10:g}%)",
        )
    return tuple(max(count * available // total, needed) for count, needed in zip(neurons, least, strict=True))
