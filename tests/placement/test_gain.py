"""The figures of orders, from headers small enough to work them out by hand."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest

from neuralink_cli.placement.gain import OrderFigures, block_gains, layer_gains, source_gains, total_gain
from neuralink_cli.placement.placement import HeldOutReads, OrderCost, PlacementBlock, PlacementHeader


def part(source: str, tokens: int, routed: int, active: int, **orders: tuple[int, float]) -> HeldOutReads:
    """Held-out reads: (reads, cost in bundles) by order."""
    return HeldOutReads(source, tokens, routed, active, {name: OrderCost(*figures) for name, figures in orders.items()})


def block(name: str, order: str, bundle_bytes: int, *held_out: HeldOutReads, pinned: int = 0) -> PlacementBlock:
    return PlacementBlock(name, 50, "relu", 0.0, 1000, order, pinned, bundle_bytes, 4.0, 3, held_out)


def header(*blocks: PlacementBlock) -> PlacementHeader:
    return PlacementHeader({}, None, {}, "gate", None, {}, blocks)


def figures(
    reads_per_token: float, mean_read_length: float, bytes_per_token: float, gain: float, gain_over_naive: float
) -> Any:
    return Near(OrderFigures(reads_per_token, mean_read_length, bytes_per_token, gain, gain_over_naive))


class Near:
    """Equal to figures that differ by rounding."""

    def __init__(self, expected: OrderFigures) -> None:
        self.expected = expected

    def __eq__(self, found: object) -> bool:
        return isinstance(found, OrderFigures) and astuple(found) == pytest.approx(astuple(self.expected), rel=1e-12)

    def __repr__(self) -> str:
        return f"about {self.expected}"


# An operation costs four bundles. Read without access collapse, the original order costs the active neurons and four
# for each of its reads: 60 + 4 * 40 and 60 + 4 * 60.
FIRST = block(
    "layers.0", "linked", 100,
    part("a", 10, 10, 60, original=(40, 200.0), linked=(20, 100.0)),
    part("b", 30, 30, 60, original=(60, 300.0), linked=(40, 150.0)),
    pinned=10,
)  # fmt: skip
# 20 + 4 * 10 and 20 + 4 * 20.
SECOND = block(
    "layers.1", "original", 200,
    part("a", 10, 10, 20, original=(10, 30.0), linked=(10, 40.0)),
    part("b", 30, 30, 20, original=(20, 50.0), linked=(20, 80.0)),
)  # fmt: skip


def test_the_figures_of_a_block_are_per_token_over_all_its_sources() -> None:
    first, second = block_gains(header(FIRST, SECOND))
    assert (first.name, first.chosen, first.active_ratio) == ("layers.0", "linked", 120 / (40 * 40))
    assert first.orders == {
        "original": figures(100 / 40, 120 / 100, 500 * 100 / 40, 1.0, 520 / 500),
        "linked": figures(60 / 40, 120 / 60, 250 * 100 / 40, 2.0, 520 / 250),
    }
    assert (second.name, second.chosen, second.active_ratio) == ("layers.1", "original", 40 / (40 * 50))
    assert second.orders["linked"] == figures(30 / 40, 40 / 30, 120 * 200 / 40, 80 / 120, 160 / 120)


def test_reads_and_bytes_of_a_token_add_up_over_blocks() -> None:
    total = total_gain(header(FIRST, SECOND))
    assert (total.name, total.chosen, total.active_ratio) == ("total", "mixed", 160 / 3600)
    original, linked, naive = 500 * 100 + 80 * 200, 250 * 100 + 120 * 200, 520 * 100 + 160 * 200
    assert total.orders["original"] == figures(130 / 40, 160 / 130, original / 40, 1.0, naive / original)
    assert total.orders["linked"] == figures(90 / 40, 160 / 90, linked / 40, original / linked, naive / linked)


def test_a_source_has_the_figures_of_its_own_tokens_in_all_blocks() -> None:
    a, b = source_gains(header(FIRST, SECOND))
    assert (a.name, b.name) == ("a", "b")
    assert a.active_ratio == 80 / (10 * 40 + 10 * 50)
    original, naive = 200 * 100 + 30 * 200, 220 * 100 + 60 * 200
    assert a.orders["original"] == figures(50 / 10, 80 / 50, original / 10, 1.0, naive / original)
    original, linked, naive = 300 * 100 + 50 * 200, 150 * 100 + 80 * 200, 300 * 100 + 100 * 200
    assert b.orders["linked"] == figures(60 / 30, 80 / 60, linked / 30, original / linked, naive / linked)


def test_what_has_no_held_out_tokens_does_not_count() -> None:
    empty = part("b", 0, 0, 0)
    nothing = block("layers.0", "original", 100, empty, empty)
    only_a = block("layers.1", "linked", 100, part("a", 10, 10, 60, original=(40, 200.0), linked=(20, 100.0)), empty)
    silent, counted = block_gains(header(nothing, only_a))
    assert (silent.active_ratio, silent.orders) == (0.0, {})
    assert counted.orders["linked"] == figures(20 / 10, 60 / 20, 100 * 100 / 10, 2.0, 2.2)
    # The block without tokens comes first, and those after it count all the same.
    total = total_gain(header(nothing, only_a))
    assert (total.active_ratio, total.orders) == (60 / (10 * 50), counted.orders)


def test_an_order_that_reads_nothing_gains_nothing() -> None:
    silent = block("layers.0", "original", 100, part("a", 10, 10, 0, original=(0, 0.0), linked=(0, 0.0)))
    assert total_gain(header(silent)).orders["linked"] == figures(0.0, 0.0, 0.0, 1.0, 1.0)


def test_orders_that_all_blocks_compare_are_listed_as_the_tables_have_them() -> None:
    orders = {"zebra": (1, 1.0), "refined": (1, 1.0), "linked": (1, 1.0), "original": (1, 1.0), "anything": (1, 1.0)}
    fewer = {name: orders[name] for name in ("refined", "zebra", "anything", "original")}
    first, second = (
        block("x", "linked", 1, part("a", 1, 1, 1, **orders)),
        block("y", "linked", 1, part("a", 1, 1, 1, **fewer)),
    )
    assert list(total_gain(header(first)).orders) == ["original", "linked", "refined", "anything", "zebra"]
    assert list(total_gain(header(first, second)).orders) == ["original", "refined", "anything", "zebra"]
    assert list(total_gain(header(second, first)).orders) == ["original", "refined", "anything", "zebra"]


def test_the_experts_of_a_layer_are_one_row() -> None:
    one = part("a", 10, 4, 8, original=(4, 12.0), linked=(2, 6.0))
    other = part("a", 10, 6, 8, original=(8, 20.0), linked=(6, 10.0))
    experts = [block(f"layers.0.experts.{k}", "linked", 100, reads) for k, reads in enumerate((one, other))]
    rows = layer_gains(header(*experts, SECOND))
    assert [row.name for row in rows] == ["layers.0.experts (2)", "layers.1"]
    assert rows[0].orders["linked"] == figures(8 / 10, 16 / 8, 16 * 100 / 10, 2.0, 64 / 16)
    assert rows[0].active_ratio == 16 / (10 * 50)
    assert rows[1] == block_gains(header(SECOND))[0]
