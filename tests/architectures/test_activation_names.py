from __future__ import annotations

import pytest

from neuralink_cli.architectures.activation_names import split_cut, with_cut


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
