"""How good the orders are: cost relative to the original order, on held-out tokens and on text of another kind.

python benchmarks/order_quality.py wiki.trace.safetensors --transfer alpaca.trace.safetensors

Every order is made on the first 80 % of each trace's tokens and measured on the rest. With --transfer, orders are also
measured on the held-out tokens of the other trace, and made on the two together. The bound is what
no order could cost less than on these tokens, not even one made on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.devices.cost import order_cost
from neuralink_cli.ordering.baselines import frequency_order
from neuralink_cli.ordering.block_ordering import block_bits
from neuralink_cli.ordering.counting import coactivation_counts
from neuralink_cli.ordering.orders import NeuronOrder, OrderingTask, make_orders, pinned_first
from neuralink_cli.placement.bits import Bits, activation_counts
from neuralink_cli.placement.held_out import split_tokens

ORDERS = ("frequency", "reverse-cuthill-mckee", "spectral", "linked", "refined")


@dataclass(frozen=True, eq=False)
class Layer:
    """Bit vectors of a block: of the tokens that make orders, and of those that measure them."""

    ordering: Bits
    held_out: Bits


def read_layers(path: Path, held_out: float) -> list[Layer]:
    with Trace(path) as trace:
        split = split_tokens(trace, held_out)
        return [
            Layer(
                block_bits(trace, block, split.ordering),
                block_bits(trace, block, [part for ranges in split.held_out for part in ranges]),
            )
            for block in trace.info.blocks
        ]


def make(
    bits: Bits, names: Sequence[str], ratio: float, pinned: float, effort: str
) -> dict[str, npt.NDArray[np.int32]]:
    """The orders of a whole block, pinned neurons first (except in the original order)."""
    n = bits.shape[0]
    hot = frequency_order(activation_counts(bits))[: int(n * pinned)]
    rest = np.setdiff1d(np.arange(n, dtype=np.int32), hot)
    made = make_orders(OrderingTask(np.ascontiguousarray(bits[rest]), ratio, effort), names)
    whole: dict[str, NeuronOrder] = {name: pinned_first(hot, rest, order) for name, order in made.items()}
    return {"original": np.arange(n, dtype=np.int32), **{name: order.order for name, order in whole.items()}}


def measured(bits: Bits, order: npt.NDArray[np.int32], hot: npt.NDArray[np.int32], ratio: float) -> float:
    """Cost of an order when the neurons `hot` are in DRAM."""
    flash = bits.copy()
    flash[hot] = 0
    return order_cost(flash, order, ratio)


def cost_bound(bits: Bits, hot: npt.NDArray[np.int32], ratio: int) -> float:
    """A cost below which no order of these bits can be.

    Term j of the cost counts the active slots without an active one among the j before them. That is at least one per
    token that reads anything; at least sum_i max(0, f(i) - the j largest f(i, .)); and at least sum_i f(i) less half of
    each neuron's 2j largest co-activations, since it has at most 2j neighbours within reach and shares each with one.
    """
    flash = bits.copy()
    flash[hot] = 0
    fired = activation_counts(flash).astype(np.float64)
    upper = coactivation_counts(flash).astype(np.float64)
    together = upper + upper.T
    np.fill_diagonal(together, 0)
    strongest = -np.sort(-together, axis=1)[:, : 2 * ratio].cumsum(axis=1)
    tokens = int(np.bitwise_count(np.bitwise_or.reduce(flash, axis=0)).sum())
    bound = fired.sum()
    for j in range(1, ratio + 1):
        one_sided = np.maximum(0, fired - strongest[:, j - 1]).sum()
        two_sided = fired.sum() - strongest[:, min(2 * j, strongest.shape[1]) - 1].sum() / 2
        bound += max(tokens, one_sided, two_sided)
    return float(bound)


def table(
    title: str, made_on: Sequence[Bits], measured_on: Sequence[Bits], options: argparse.Namespace, names: Sequence[str]
) -> None:
    """Print relative costs, one row for each ratio and pinned share, means over layers (and layer by layer with -v)."""
    print(f"\n{title}")
    labels = ["original", *(name if len(name) < 10 else "rcm" for name in names), "bound", "refined/linked"]
    print(f"{'G':>3} {'pinned':>7} " + " ".join(f"{label:>10}" for label in labels))
    for pinned in options.pinned:
        for ratio in options.ratio:
            rows = []
            for ordering, held_out in zip(made_on, measured_on, strict=True):
                orders = make(ordering, names, ratio, pinned, options.effort)
                hot = frequency_order(activation_counts(ordering))[: int(ordering.shape[0] * pinned)]
                costs = [measured(held_out, order, hot, ratio) for order in orders.values()]
                costs.append(cost_bound(held_out, hot, ratio))
                rows.append(np.array(costs) / costs[0])
            for layer, row in enumerate(rows if options.layers else []):
                print_row(ratio, f"L{layer} {pinned:.0%}", row)
            print_row(ratio, f"{pinned:.0%}", np.mean(rows, axis=0))


def print_row(ratio: int, label: str, row: npt.NDArray[np.float64]) -> None:
    cells = [*row, row[-2] / row[-3]]
    print(f"{ratio:3} {label:>7} " + " ".join(f"{cell:10.3f}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--transfer", type=Path, help="trace of the same model on text of another kind")
    parser.add_argument("--ratio", type=int, nargs="+", default=[1, 4, 8], help="cost of an operation in bundles, G")
    parser.add_argument("--pinned", type=float, nargs="+", default=[0, 0.05, 0.1, 0.2], help="shares in DRAM")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--layers", action="store_true", help="also print every layer")
    options = parser.parse_args()
    own = read_layers(options.trace, options.held_out)
    print("cost over that of the original order, mean over layers; lower is better")
    ordering, held_out = [layer.ordering for layer in own], [layer.held_out for layer in own]
    table(f"made on {options.trace.name}, measured on its held-out tokens", ordering, held_out, options, ORDERS)
    if options.transfer is None:
        return
    other = read_layers(options.transfer, options.held_out)
    other_held_out = [layer.held_out for layer in other]
    few = ("frequency", "linked", "refined")
    table(f"made on {options.trace.name}, measured on {options.transfer.name}", ordering, other_held_out, options, few)
    mixed = [np.concatenate([a.ordering, b.ordering], axis=1) for a, b in zip(own, other, strict=True)]
    table(f"made on both, measured on {options.trace.name}", mixed, held_out, options, few)
    table(f"made on both, measured on {options.transfer.name}", mixed, other_held_out, options, few)


if __name__ == "__main__":
    main()
