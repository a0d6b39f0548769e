from __future__ import annotations

import pytest

from neuralink_cli.architectures.activation_names import (
    split_cut,
    split_most,
    swish,
    swish_slope,
    with_cut,
    with_most,
)


@pytest.mark.parametrize(
    ("share", "name"),
    [(0.95, "gaussian_topk(0.95) silu"), (0.5, "gaussian_topk(0.5) silu"), (0, "silu"), (0.0, "silu")],
)
def test_a_cut_is_part_of_the_name(share: float, name: str) -> None:
    assert with_cut("silu", share) == name
    assert split_cut(name) == (share, "silu")


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_is_below_one(share: float) -> None:
    with pytest.raises(ValueError, match="is no share of neurons below 1"):
        with_cut("silu", share)


@pytest.mark.parametrize("name", ["silu", "gaussian_topk(0.5)", "gaussian_topk(2) silu", "gaussian_topk(x) silu"])
def test_other_names_have_no_cut(name: str) -> None:
    assert split_cut(name) == (0.0, name)


@pytest.mark.parametrize(("number", "written"), [(7.0, "7"), (1.702, "1.702"), (1e-7, "1e-07"), (1e20, "1e+20")])
def test_clamps_and_slopes_are_part_of_the_name(number: float, written: str) -> None:
    assert with_most("silu", number) == f"at_most({written}) silu"
    assert split_most(f"at_most({written}) silu") == (number, "silu")
    assert swish(number) == f"swish({written})"
    assert swish_slope(f"swish({written})") == number


@pytest.mark.parametrize(
    "name", ["silu", "swish", "swish()", "swish(-1)", "at_most(7)", "at_most(x) silu", "swish(nan)"]
)
def test_other_names_have_neither(name: str) -> None:
    assert split_most(name) == (None, name)
    assert swish_slope(name) is None
