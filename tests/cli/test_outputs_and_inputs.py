"""Paths that are mistaken for one another: an output that is an input, and inputs of the wrong kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from neuralink_cli.cli.exit_codes import OUTPUT
from tests.checkpoints import files_of, write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory


@pytest.fixture
def trace(layouts: LayoutFactory, tmp_path: Path) -> Path:
    return write_random_trace(layouts.checkpoint()[0], tmp_path / "trace")


def test_an_input_is_not_replaced_by_the_output_whatever_overwrite_says(
    neuralink: Neuralink, layouts: LayoutFactory, trace: Path, tmp_path: Path
) -> None:
    made = layouts.bundled()
    text = tmp_path / "text.txt"
    text.write_text("The river rises.\n")
    (tmp_path / "link").symlink_to(trace)
    before = trace.read_bytes()
    for arguments in (
        ("cluster", trace, "-o", trace),
        ("cluster", tmp_path / "link", "-o", trace),
        ("bench", made.layout, "--trace", trace, "--csv", trace),
        ("profile", made.model, "--dataset", text, "-o", text),
        ("profile", made.model, "--dataset", text, "--thresholds-from", trace, "-o", trace),
        ("probe", "--from-fio", text, "-o", text),
    ):
        outcome = neuralink(*arguments, "--overwrite", "-q")
        assert outcome.code == 6
        assert "is an input of this command; choose another output" in outcome.error
    assert (trace.read_bytes(), text.read_text()) == (before, "The river rises.\n")


def test_the_files_of_a_model_are_not_replaced_whatever_overwrite_says(
    neuralink: Neuralink, layouts: LayoutFactory, trace: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(layouts.checkpoint()[0], tmp_path / "model"))
    before = files_of(model)
    text = tmp_path / "text.txt"
    text.write_text("The river rises.\n")
    for command in (("profile", model, "--dataset", text), ("cluster", trace), ("merge", trace, trace)):
        for name, holds in (("model.safetensors", "weights"), ("config.json", "JSON"), ("tokenizer.json", "JSON")):
            outcome = neuralink(*command, "-o", model / name, "--overwrite", "-q")
            assert outcome.code == OUTPUT
            assert f"{name}: holds {holds} and is no output of this command, so it is not replaced" in outcome.error
    bench = ("bench", layouts.bundled().layout, "--trace", trace, "--csv")
    for text_command, name, kind in (
        (bench, "model.safetensors", "binary"),
        (bench, "config.json", "JSON"),
        (("probe", tmp_path, "-o"), "model.safetensors", "binary"),
        (("probe", tmp_path, "-o"), "config.json", "JSON"),
    ):
        outcome = neuralink(*text_command, model / name, "--overwrite", "-q")
        assert outcome.code == OUTPUT
        assert f"{name}: is {kind} and is no output of this command, so it is not replaced" in outcome.error
    assert files_of(model) == before


def test_an_earlier_output_is_replaced_even_if_it_is_damaged(neuralink: Neuralink, trace: Path, tmp_path: Path) -> None:
    placement = tmp_path / "placement"
    assert neuralink("cluster", trace, "-o", placement, "-q").code == 0
    whole = placement.read_bytes()
    for there in (whole, whole[:-1], whole[:100], b""):
        placement.write_bytes(there)
        assert neuralink("cluster", trace, "-o", placement, "--overwrite", "-q").code == 0
        assert placement.read_bytes() == whole


def test_what_is_needed_is_said_of_whatever_is_there(
    neuralink: Neuralink, layouts: LayoutFactory, trace: Path, tmp_path: Path
) -> None:
    made = layouts.bundled()
    (tmp_path / "folder").mkdir()
    wrote = "pass the file that `neuralink {}` wrote"
    for path, what in (
        (tmp_path / "folder", "is a directory, but a trace is needed; " + wrote.format("profile")),
        (made.layout, "is a bundled layout, but a trace is needed; " + wrote.format("profile")),
        (made.placement, "but a 'neuralink-trace' file is needed; " + wrote.format("profile")),
    ):
        outcome = neuralink("cluster", path, "-o", tmp_path / "out", "-q")
        assert outcome.code == 3
        assert what in outcome.error
    shown = neuralink("report", made.layout, "--trace", made.layout, "-o", tmp_path / "page.html", "-q")
    assert "is a bundled layout, but a trace is needed" in shown.error
    swapped = neuralink("estimate", made.model, "--placement", trace, "-q")
    assert "but a 'neuralink-placement' file is needed; " + wrote.format("cluster") in swapped.error
