"""Estimates what a bench takes: memory, before it replays anything."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import Contender
from neuralink_cli.bench.replay_kernels import COLUMNS
from neuralink_cli.files.free_memory import remark_if_short, resident_bytes, with_margin
from neuralink_cli.kernels import available_cpus, load_compiler
from neuralink_cli.sizes import human_bytes

logger = logging.getLogger(__name__)

_ENTRY = 8
# Of a token and a way: counts, useful and read bytes, seconds.
_FIGURES = _ENTRY * (COLUMNS + 3)
# Of a slot that fires: its number; and if reads are recorded, where one starts and how long it is.
_SLOT, _READ = 4, 8
# Compiled kernels, with what numba keeps beside them, and what threads keep of memory that was freed.
_KERNEL_BYTES = 16 << 20


def tell_needs(trace: Trace, contenders: Sequence[Contender], tokens: int, ways: int, *, record: bool) -> None:
    """Log roughly how much memory it takes to replay some tokens.

    Args:
        tokens: Tokens that are replayed.
        ways: Ways of storing and reading that they are replayed in.
        record: Whether the reads of every way are kept, to be made.
    """
    load_compiler()
    programs = resident_bytes() + _KERNEL_BYTES
    replay = replay_bytes(trace, contenders, tokens, ways, record=record)
    needed = with_margin(programs + replay)
    logger.info(
        "takes about %s of memory (%s to replay %s tokens in %s ways, the rest for programs)",
        human_bytes(needed),
        human_bytes(replay),
        f"{tokens:,}",
        ways,
    )
    remark_if_short(needed)


def replay_bytes(trace: Trace, contenders: Sequence[Contender], tokens: int, ways: int, *, record: bool) -> int:
    """Bytes that a replay takes at its peak: the figures of all ways, and one block as it fires, in every order.

    How many neurons fire is taken from the tokens that made the first contender's order.
    """
    # The original order and that by frequency are baselines.
    orders = len(contenders) + 2
    most, all_blocks = 0, 0.0
    for block, stored in zip(trace.info.blocks, contenders[0].blocks, strict=True):
        slots = float(stored.frequency.sum()) * tokens
        # Of all parts and strung together, while they are read.
        rows = 2 * block.row_bytes * tokens
        most = max(most, round(rows + orders * (_SLOT * slots + 2 * _ENTRY * tokens)))
        all_blocks += slots
    figures = (ways + min(ways, available_cpus())) * _FIGURES * tokens
    return most + figures + (round(ways * _READ * all_blocks) if record else 0)
