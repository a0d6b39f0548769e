"""The data file of `make sweep`, and the section of the docs that is made from it."""

from __future__ import annotations

from pathlib import Path

from tests import swept
from tests.stages import TABLE
from tests.swept import OUTCOMES, Swept


def test_nothing_is_wrong() -> None:
    _, found = swept.read()
    assert {one.outcome for one in found} <= set(OUTCOMES)
    assert [one.model_type for one in found if "wrong" in (one.outcome, one.inferred)] == []
    assert all(one.words for one in found if one.outcome != "pass")


def test_the_docs_end_with_what_was_found() -> None:
    assert TABLE.read_text().endswith("\n\n" + swept.render(*swept.read()))


def test_the_section_has_every_type_once_and_reasons_without_advice(tmp_path: Path) -> None:
    found = [
        Swept("a", "causal-lm", "pass"),
        Swept("b", "encoder", "refused", "it is not known; try", "pass"),
        Swept("c", "seq2seq", "refused", "x|y; describe it in a file"),
        Swept(
            "d",
            "causal-lm",
            "refused",
            "it is not known",
            "refused",
            "its architecture cannot be inferred: no; describe",
        ),
        Swept("e", "causal-lm", "not built", "too large"),
    ]
    swept.write(tmp_path / "data.json", "9.0", found)
    assert swept.read(tmp_path / "data.json") == ("9.0", found)
    text = swept.render("9.0", found)
    assert "**1 pass**: `a`." in text
    assert "**1 pass with `--infer-architecture`**: `b`." in text
    assert "| `c` | x\\|y |\n| `d` | no |\n" in text
    assert text.endswith("| `e` | too large |\n")
