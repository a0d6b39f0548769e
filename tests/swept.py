"""What came of every model type of transformers, as `tests/long/sweep_architectures.py` found it out.

Its data file is in docs/ and becomes a section of docs/supported.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).parent.parent / "docs/model_types.json"
# How messages begin that say nothing more until their colon.
_INTRODUCTION = re.compile(r"^(its architecture cannot be inferred|model type '[^']*' is not supported): ")
OUTCOMES = ("pass", "refused", "wrong", "not built")


@dataclass(frozen=True)
class Swept:
    """What came of a model type.

    Attributes:
        outcome: One of `OUTCOMES`.
        words: Of the refusal, or what is wrong.
        inferred: The outcome with --infer-architecture; None if the type has a built-in description.
    """

    model_type: str
    task: str
    outcome: str
    words: str = ""
    inferred: str | None = None
    inferred_words: str = ""


def read(path: Path = DATA) -> tuple[str, list[Swept]]:
    """The version of transformers that was swept, and its types."""
    document = json.loads(path.read_text())
    return document["transformers"], [Swept(**one) for one in document["model_types"]]


def write(path: Path, version: str, swept: Sequence[Swept]) -> None:
    """Write the data file: a line per type."""
    lines = ",\n".join("    " + json.dumps({key: v for key, v in asdict(one).items() if v}) for one in swept)
    path.write_text(f'{{\n  "transformers": "{version}",\n  "model_types": [\n{lines}\n  ]\n}}\n')


def render(version: str, swept: Sequence[Swept]) -> str:
    """The section of the docs."""
    passed = [one for one in swept if one.outcome == "pass"]
    inferred = [one for one in swept if one.outcome == "refused" and one.inferred == "pass"]
    refused = [one for one in swept if one.outcome in ("refused", "wrong") and one not in inferred]
    not_built = [one for one in swept if one.outcome == "not built"]
    return "\n".join(
        [
            "## All model types of transformers",
            "",
            f"`make sweep` builds the smallest random model of every model type for text in transformers {version},",
            "takes it through `profile`, `cluster`, `relayout` (bundled, permuted), `verify` and `verify --forward`,",
            "and compares what transformers computes with the original and with the permuted model.",
            "",
            f"**{len(passed)} pass**: {_names(passed)}.",
            "",
            f"**{len(inferred)} pass with `--infer-architecture`**: {_names(inferred)}.",
            "",
            f"**{len(refused)} are refused**, most of them because their FFNs are of another kind or there are none:",
            "",
            *_table("why", [(one, _why(one)) for one in refused]),
            "",
            f"**{len(not_built)} could not be built** by making the usual sizes in their configs small:",
            "",
            *_table("reason", [(one, one.words) for one in not_built]),
            "",
        ]
    )


def _why(one: Swept) -> str:
    """Of a type that is not known, why its architecture cannot be inferred says more."""
    return one.inferred_words if "is not known" in one.words and one.inferred_words else one.words


def _names(swept: Sequence[Swept]) -> str:
    return ", ".join(f"`{one.model_type}`" for one in swept) or "none"


def _table(heading: str, lines: Sequence[tuple[Swept, str]]) -> list[str]:
    rows = [f"| model type | {heading} |", "| --- | --- |"]
    return rows + [f"| `{one.model_type}` | {_first_sentence(words)} |" for one, words in lines]


def _first_sentence(words: str) -> str:
    """What a message says, without its advice."""
    said = _INTRODUCTION.sub("", words).partition("; ")[0].replace("|", "\\|")
    return said if len(said) <= 200 else said[:197] + "..."
