"""How much DRAM each contender of a bench has: the same in bytes for all, whatever it is used for."""

from __future__ import annotations

from collections.abc import Sequence

from neuralink_cli.bench.contenders import Contender
from neuralink_cli.errors import OptionError
from neuralink_cli.storage.budget import DramBudget, split_bundles


def dram_bytes(contenders: Sequence[Contender], budget: DramBudget, size: int | None) -> int:
    """The DRAM that all contenders have: for cached and pinned bundles, and for the rows that some keep resident.

    A share is of the bundles, beside those rows: it is taken of the contender that then needs most.

    Args:
        size: Bytes that every bundle is scaled to; None for those of the layouts.
    """
    if not (budget.bytes or budget.fraction):
        return 0
    if budget.bytes is not None:
        return budget.bytes
    needs = [(resident_bytes(each, size), sum(_strided(each, size))) for each in contenders]
    return max(resident + budget.bytes_of(total) for resident, total in needs)


def block_capacities(contender: Contender, dram: int, size: int | None) -> tuple[int, ...]:
    """Bundles in DRAM of each block; none if there is no DRAM at all.

    Raises:
        OptionError: The resident rows, or the pinned bundles, do not fit.
    """
    blocks = contender.blocks
    if not dram:
        return (0,) * len(blocks)
    resident = resident_bytes(contender, size)
    if dram <= resident:
        raise OptionError(
            f"{dram:,} bytes of DRAM do not hold the {resident:,} bytes that {contender.path} keeps resident",
            fix="allow more with --dram, or leave the layout with resident rows out",
        )
    strides = [size or block.stride for block in blocks]
    neurons, pinned = [block.neurons for block in blocks], [block.pinned for block in blocks]
    return split_bundles(DramBudget(bytes=dram - resident), neurons, strides, pinned)


def resident_bytes(contender: Contender, size: int | None) -> int:
    """Bytes of resident rows, in proportion if bundles are scaled."""
    if size is None:
        return contender.resident_bytes
    return contender.resident_bytes * sum(_strided(contender, size)) // contender.bundle_bytes


def _strided(contender: Contender, size: int | None) -> list[int]:
    """Bytes of the bundles of each block."""
    return [block.neurons * (size or block.stride) for block in contender.blocks]
