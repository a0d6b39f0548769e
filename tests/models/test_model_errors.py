"""What a model raises when it is loaded or run is told as a fault of the model, in words that say something."""

from __future__ import annotations

import pytest
import torch

from neuralink_cli.errors import InputError, MismatchError, first_line, shorten
from neuralink_cli.models.model_errors import explained_model_errors, require_known_tokens


class Wrong:
    """Stands in for a model."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.zeros(3, 4)


def test_what_a_forward_raises_is_bad_input_and_says_where() -> None:
    with (
        pytest.raises(
            InputError, match=r"Wrong of transformers fails when it runs: mat1 and mat2 .* \(test_model_errors.py, line"
        ),
        explained_model_errors(Wrong()),
    ):
        Wrong()(torch.zeros(2, 2))


def test_our_own_errors_go_through_as_they_are() -> None:
    with pytest.raises(MismatchError), explained_model_errors(None):
        raise MismatchError("x")
    # Raised in a function of this package, so it is a bug of ours.
    with pytest.raises(TypeError), explained_model_errors(None):
        require_known_tokens(None, 3, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Error(s) in loading state_dict for X:\n\tsize mismatch for y: 3 and 4.", "size mismatch for y: 3 and 4"),
        ("\n\nplain and long enough to say what is wrong.\nmore", "plain and long enough to say what is wrong"),
        ("Oh no\nthe disk has gone", "Oh no the disk has gone"),
        ("", "RuntimeError"),
        ("x" * 2000, "x ... x"),
    ],
)
def test_a_first_line_that_says_nothing_is_not_all(text: str, said: str) -> None:
    found = first_line(RuntimeError(text))
    assert said in found
    assert len(found) <= 250


def test_the_ends_of_a_long_message_are_kept() -> None:
    found = shorten("start " + "x" * 999 + " end")
    assert len(found) <= 500
    assert (found[:5], found[-3:]) == ("start", "end")
