"""The orders that a block can be stored in, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from neuralink_cli.arrays import Neurons
from neuralink_cli.ordering.linking import link_tiled
from neuralink_cli.ordering.partners import likely_partners, strongest_links
from neuralink_cli.placement.bits import Bits, activation_counts
from neuralink_cli.placement.placement import FREQUENCY, LINKED, ORIGINAL, REFINED, REVERSE_CUTHILL_MCKEE, SPECTRAL

GRAPH_LINKS = 32


@dataclass(frozen=True, eq=False)
class NeuronOrder:
    """An order of the neurons of a block, and the slots at which its links start: every slot, if nothing was linked."""

    order: Neurons
    links: Neurons


@dataclass(frozen=True, eq=False)
class OrderingTask:
    """What an order is made from: bit vectors of the neurons to order, and what a read operation costs in bundles.

    `between_sweeps` is called after each sweep of the refinement; an exception from it stops the work. `own` makes
    orders that are not built in, by name. `threads` count; None for one on each CPU.
    """

    bits: Bits
    operation_in_bundles: float
    effort: str
    between_sweeps: Callable[[], object] | None = None
    own: Mapping[str, Callable[[Bits], Neurons]] = field(default_factory=dict)
    threads: int | None = None


def make_orders(task: OrderingTask, names: Collection[str]) -> dict[str, NeuronOrder]:
    """Make the orders with these names (keys of `ORDER_MAKERS`, or of `task.own`)."""
    made: dict[str, NeuronOrder] = {}
    for name, maker in ORDER_MAKERS.items():
        if name in names:
            made[name] = maker(task, made)
    for name, own in task.own.items():
        if name in names:
            made[name] = _unlinked(own(task.bits))
    return made


def pinned_first(pinned: Neurons, rest: Neurons, order: NeuronOrder) -> NeuronOrder:
    """The order of a whole block: the pinned neurons in one link, then the others by `order`.

    Args:
        pinned: Neurons to put first.
        rest: The other neurons; `order` holds indices into `rest`.
    """
    whole = np.concatenate([pinned, rest[order.order]]).astype(np.int32)
    start = np.zeros(1 if pinned.size else 0, dtype=np.int32)
    return NeuronOrder(whole, np.concatenate([start, order.links + np.int32(pinned.size)]).astype(np.int32))


def _original(task: OrderingTask, _made: dict[str, NeuronOrder]) -> NeuronOrder:
    from neuralink_cli.ordering.baselines import original_order

    return _unlinked(original_order(task.bits.shape[0]))


def _frequency(task: OrderingTask, _made: dict[str, NeuronOrder]) -> NeuronOrder:
    from neuralink_cli.ordering.baselines import frequency_order

    return _unlinked(frequency_order(activation_counts(task.bits)))


def _reverse_cuthill_mckee(task: OrderingTask, _made: dict[str, NeuronOrder]) -> NeuronOrder:
    from neuralink_cli.ordering.baselines import reverse_cuthill_mckee_order

    links = strongest_links(task.bits, GRAPH_LINKS, workers=task.threads)
    return _unlinked(reverse_cuthill_mckee_order(*links, activation_counts(task.bits)))


def _spectral(task: OrderingTask, _made: dict[str, NeuronOrder]) -> NeuronOrder:
    from neuralink_cli.ordering.baselines import spectral_order

    return _unlinked(
        spectral_order(*strongest_links(task.bits, GRAPH_LINKS, workers=task.threads), activation_counts(task.bits))
    )


def _linked(task: OrderingTask, _made: dict[str, NeuronOrder]) -> NeuronOrder:
    linking = link_tiled(task.bits, activation_counts(task.bits), workers=task.threads)
    return NeuronOrder(linking.order, linking.links)


def _refined(task: OrderingTask, made: dict[str, NeuronOrder]) -> NeuronOrder:
    from neuralink_cli.ordering.refinement import EFFORTS, PARTNERS, refine

    linked = made.get(LINKED) or _linked(task, made)
    partners = likely_partners(task.bits, PARTNERS, workers=task.threads)
    refined = refine(
        task.bits,
        linked.order,
        partners,
        task.operation_in_bundles,
        sweeps=EFFORTS[task.effort],
        on_sweep=task.between_sweeps,
    )
    return _unlinked(refined.order) if refined.moves else linked


def _unlinked(order: Neurons) -> NeuronOrder:
    return NeuronOrder(order, np.arange(order.size, dtype=np.int32))


ORDER_MAKERS: dict[str, Callable[[OrderingTask, dict[str, NeuronOrder]], NeuronOrder]] = {
    ORIGINAL: _original,
    FREQUENCY: _frequency,
    REVERSE_CUTHILL_MCKEE: _reverse_cuthill_mckee,
    SPECTRAL: _spectral,
    LINKED: _linked,
    REFINED: _refined,
}
