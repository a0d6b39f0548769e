"""The card's table stays a table whatever a dataset is called."""

from __future__ import annotations

from neuralink_cli.layout.companions import table_rows
from neuralink_cli.placement.gain import Gain, OrderFigures


def test_names_cannot_break_the_table() -> None:
    figures = {"original": OrderFigures(2.0, 1.5, 100.0, 1.0, 1.25)}
    rows = table_rows([Gain("a|b\nc.txt", "linked", 0.1, figures)])
    assert rows[-1] == r"| a\|b c.txt | 10.0% | 2.0 / 1.50 / 1.00 / 1.25 |"
    assert all("\n" not in row for row in rows)
