"""Every option that takes a file, given every file that it does not take: the message says what to do instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory, Made

MISTAKES = ("absent", "folder", "empty", "text", "json", "image", "weights", "trace cut off")

# What follows `neuralink`, from a layout, its trace and the file that is wrong.
COMMANDS: dict[str, Callable[[Made, Path, Path], tuple[object, ...]]] = {
    "cluster TRACE": lambda made, trace, wrong: ("cluster", wrong),
    "cluster --device": lambda made, trace, wrong: ("cluster", trace, "--device", wrong),
    "cluster --order-from": lambda made, trace, wrong: ("cluster", trace, "--order-from", wrong),
    "cluster --scheduler": lambda made, trace, wrong: ("cluster", trace, "--scheduler", wrong),
    "merge": lambda made, trace, wrong: ("merge", wrong, trace),
    "relayout --placement": lambda made, trace, wrong: ("relayout", made.model, "--placement", wrong),
    "relayout --architecture": lambda made, trace, wrong: (
        *("relayout", made.model, "--placement", made.placement, "--architecture", wrong),
    ),
    "verify LAYOUT": lambda made, trace, wrong: ("verify", made.model, wrong),
    "bench FLASH": lambda made, trace, wrong: ("bench", wrong, "--trace", trace),
    "diff": lambda made, trace, wrong: ("diff", trace, wrong),
    "inspect": lambda made, trace, wrong: ("inspect", wrong),
    "build -f": lambda made, trace, wrong: ("build", "-f", wrong),
    "probe --from-fio": lambda made, trace, wrong: ("probe", "--from-fio", wrong),
}
WITHOUT_OUTPUT = ("verify", "bench", "diff", "inspect")


@pytest.fixture(scope="module")
def wrong(layouts: LayoutFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wrong")
    made = layouts.bundled()
    found = {name: folder / name.replace(" ", "-") for name in MISTAKES}
    found["folder"].mkdir()
    found["empty"].touch()
    found["text"].write_text("The river rises.\n" * 9)
    found["json"].write_text(json.dumps({"some": "document"}))
    found["image"].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(99)))
    found["weights"] = next(made.model.glob("*.safetensors"))
    whole = write_random_trace(layouts.checkpoint()[0], folder / "trace").read_bytes()
    found["trace cut off"].write_bytes(whole[: len(whole) - 9])
    return found


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_message_says_what_to_do_instead(
    neuralink: Neuralink, layouts: LayoutFactory, wrong: dict[str, Path], tmp_path: Path, command: str, mistake: str
) -> None:
    made = layouts.bundled()
    trace = write_random_trace(layouts.checkpoint()[0], tmp_path / "trace")
    arguments = COMMANDS[command](made, trace, wrong[mistake])
    output = () if arguments[0] in WITHOUT_OUTPUT else ("-o", tmp_path / "out")
    outcome = neuralink(*arguments, *output, "-q")
    assert outcome.code in (2, 3, 4, 5), outcome.error
    assert "; " in outcome.error, outcome.error


@pytest.mark.parametrize("dram", ["100.1%", "120%"])
def test_a_cache_is_not_larger_than_all_bundles(
    neuralink: Neuralink, layouts: LayoutFactory, tmp_path: Path, dram: str
) -> None:
    trace = write_random_trace(layouts.checkpoint()[0], tmp_path / "trace")
    outcome = neuralink("bench", layouts.bundled().layout, "--trace", trace, "--dram", dram, "-q")
    assert outcome.code == 2
    assert f"'{dram}' is more than all bundles; pass at most 100%" in outcome.error
