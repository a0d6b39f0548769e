"""The ways to store and read neurons that a bench compares, and their replay, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import Contender, ContenderBlock, TokenRange
from neuralink_cli.bench.replay import (
    BlockCache,
    BlockReads,
    FiringSlots,
    ReadPrices,
    TokenFigures,
    firing_slots,
    read_prices,
    replay_block,
)
from neuralink_cli.bench.replay_kernels import ACTIVE
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.kernels import available_cpus
from neuralink_cli.placement.placement import FREQUENCY, ORIGINAL
from neuralink_cli.storage.cache import cache_policy

# Each matrix stored on its own, as in a checkpoint.
UNBUNDLED = "unbundled"
# The orders that every layout is compared with.
BASELINES = (UNBUNDLED, ORIGINAL, FREQUENCY)


@dataclass(frozen=True)
class Way:
    """A way to store and read neurons.

    Attributes:
        name: Name of the order: "unbundled", "original", "frequency", or that of a layout.
        layout: Path of the layout the order is from; None for a baseline.
        collapse: Whether gaps are read across where that is cheaper.
        cache: Name of the cache policy.
        device: Name of the device.
        bundle_bytes: Bundle size that the layout was scaled to; None if not scaled.
    """

    name: str
    layout: str | None
    collapse: bool
    cache: str
    device: str
    bundle_bytes: int | None

    @property
    def baseline(self) -> Way:
        """What its gain is over: bundles in original order, read the same way, with the same cache and device."""
        return replace(self, name=ORIGINAL, layout=None)

    @property
    def naive(self) -> Way:
        """What its gain over naive reading is over: bundles in original order, no gap read across, the same cache."""
        return replace(self, name=ORIGINAL, layout=None, collapse=False)


@dataclass(frozen=True, eq=False)
class Task:
    """A way, with what replaying it needs besides the order."""

    way: Way
    contender: Contender
    device: DeviceModel
    capacities: tuple[int, ...]

    def bundle_bytes(self, block: ContenderBlock) -> int:
        """Bytes of a bundle."""
        return self.way.bundle_bytes or block.stride

    def parts(self, block: ContenderBlock) -> int:
        """Stretches far from each other that a bundle is stored in."""
        return block.parts if self.way.name == UNBUNDLED else 1

    def prices(self, block: ContenderBlock) -> ReadPrices:
        """What its reads of a block cost."""
        size, parts = self.bundle_bytes(block), self.parts(block)
        return read_prices(self.device, block.neurons, size, parts=parts, collapse=self.way.collapse)

    def order(self, block: ContenderBlock) -> npt.NDArray[np.int32]:
        """The neuron in every slot: int32 `[n]`."""
        if self.way.layout is not None:
            return block.order
        if self.way.name == FREQUENCY:
            # By descending frequency, ties by neuron: the stored frequencies are by slot.
            by_neuron = np.empty(block.neurons, dtype=np.float32)
            by_neuron[block.order] = block.frequency
            return np.argsort(-by_neuron, kind="stable").astype(np.int32)
        return np.arange(block.neurons, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Replayed:
    """What a replay gave.

    Attributes:
        figures: Of each way, token by token.
        block_seconds: float64 `[ways, blocks]`, the time of all tokens together in each block.
        block_active: int64 `[blocks]`, how often neurons of a block fired, over all tokens.
    """

    figures: tuple[TokenFigures, ...]
    block_seconds: npt.NDArray[np.float64]
    block_active: npt.NDArray[np.int64]


def replay_ways(
    trace: Trace,
    tokens: Sequence[TokenRange],
    tasks: Sequence[Task],
    recorders: Mapping[int, Callable[[BlockReads], object]],
    advance: Callable[[int], object],
) -> Replayed:
    """Replay tokens in every way; one block at a time is in memory.

    Args:
        tokens: Strung together, one range after the other.
        recorders: For the number of a task, receives the reads of each of its blocks in turn.
        advance: Called with the number of ways whenever some are done with a block.
    """
    count = sum(part.tokens for part in tokens)
    groups = _alike(tasks, recorders)
    of_group = [TokenFigures.empty(count) for _ in groups]
    places = {k: g for g, members in enumerate(groups) for k in members}
    figures = tuple(of_group[places[k]] for k in range(len(tasks)))
    blocks = len(trace.info.blocks)
    block_seconds = np.zeros((len(tasks), blocks))
    block_active = np.zeros(blocks, dtype=np.int64)
    for index in range(blocks):
        seconds = [figure.seconds.sum() for figure in figures]
        active = figures[0].counts[:, ACTIVE].sum()
        _replay_block(trace, index, tokens, tasks, groups, figures, recorders, advance)
        block_seconds[:, index] = [
            figure.seconds.sum() - before for figure, before in zip(figures, seconds, strict=True)
        ]
        block_active[index] = figures[0].counts[:, ACTIVE].sum() - active
    return Replayed(figures, block_seconds, block_active)


def _alike(tasks: Sequence[Task], recorders: Mapping[int, object]) -> list[list[int]]:
    """The numbers of the tasks, those together that read the same: access collapse changes nothing where no gap pays.

    One whose reads are recorded is alone.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, task in enumerate(tasks):
        gaps = tuple((prices.apart, prices.search) for prices in map(task.prices, task.contender.blocks))
        key = (replace(task.way, collapse=False), id(task.contender), task.device, task.capacities, gaps)
        groups.setdefault((*key, k) if k in recorders else key, []).append(k)
    return list(groups.values())


def _replay_block(
    trace: Trace,
    index: int,
    tokens: Sequence[TokenRange],
    tasks: Sequence[Task],
    groups: Sequence[Sequence[int]],
    figures: Sequence[TokenFigures],
    recorders: Mapping[int, Callable[[BlockReads], object]],
    advance: Callable[[int], object],
) -> None:
    """Replay one block in every way, as many ways at a time as there are CPUs; those of a group once for all."""
    fired = fired_at(trace, index, tokens)
    orders = {task.order(task.contender.blocks[index]).tobytes() for task in tasks}
    firing: dict[bytes, FiringSlots] = {}

    def find(key: bytes) -> None:
        firing[key] = firing_slots(fired, np.frombuffer(key, dtype=np.int32))

    def replay(group: Sequence[int]) -> None:
        k = group[0]
        task = tasks[k]
        stored = task.contender.blocks[index]
        order, parts, size = task.order(stored), task.parts(stored), task.bundle_bytes(stored)
        prices = task.prices(stored)
        pinned = np.flatnonzero(np.isin(order, stored.order[: stored.pinned])).astype(np.int32)
        capacity = task.capacities[index]
        cache = BlockCache(cache_policy(task.way.cache), capacity, pinned if capacity else pinned[:0])
        reads = replay_block(
            firing[order.tobytes()], prices, cache, size, figures[k], parts=parts, record=k in recorders
        )
        if reads is not None:
            recorders[k](reads)
        advance(len(group))

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(find, orders))
        list(pool.map(replay, groups))


def fired_at(trace: Trace, index: int, tokens: Sequence[TokenRange]) -> npt.NDArray[np.uint8]:
    """What fired in a block at some tokens: uint8 `[tokens, ceil(n / 8)]`, see `Trace.fired_by_token`."""
    block = trace.info.blocks[index]
    return np.concatenate([trace.fired_by_token(block, part.start, part.stop) for part in tokens])
