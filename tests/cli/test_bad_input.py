"""Other bad input: one clear line, a documented exit code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.placement.placement import Placement, write_placement
from tests.checkpoints import (
    NEURONS,
    decode,
    files_of,
    tensors_of,
    write_checkpoint,
    write_random_placement,
    write_random_trace,
)
from tests.cli.conftest import Neuralink
from tests.damage import FLASH, KINDS, flip, start_of
from tests.layouts import LayoutFactory

Usage = namedtuple("Usage", "total used free")


# Placements


def change_order(source: Path, target: Path, change: Callable[[Any], Any]) -> None:
    """A placement that is whole and sealed, with another order for the second block."""
    with Placement(source) as placement:
        blocks = dict(placement.blocks)
        blocks["layers.1"] = replace(blocks["layers.1"], order=change(blocks["layers.1"].order.copy()))
        write_placement(target, placement.info, blocks, placement.ordering_sequences)


def set_first(value: int) -> Callable[[Any], Any]:
    def change(order: Any) -> Any:
        order[0] = value if value >= 0 else order[1]
        return order

    return change


WRONG_ORDERS: dict[str, Callable[[Any], Any]] = {
    "a neuron twice": set_first(-1),
    "a neuron too many": lambda order: np.append(order, np.int32(NEURONS)),
    "a neuron too few": lambda order: order[order != NEURONS - 1],
    "out of range": set_first(NEURONS),
    "far out of range": set_first(2**31 - 1),
    "a matrix": lambda order: order[None],
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
def test_a_placement_that_is_no_permutation(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory, name: str
) -> None:
    model, placement = layouts.checkpoint()
    wrong = tmp_path / "wrong.safetensors"
    change_order(placement, wrong, WRONG_ORDERS[name])
    outcome = neuralink("relayout", model, "--placement", wrong, "-o", outputs / "out")
    assert outcome.code == 3
    assert outcome.error == f"{wrong}: layers.1.order is not a permutation of {NEURONS} neurons"
    assert not any(outputs.iterdir())


def test_a_placement_that_pins_more_than_there_is(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory
) -> None:
    model, placement = layouts.checkpoint()
    wrong = tmp_path / "wrong.safetensors"
    with Placement(placement) as opened:
        blocks = tuple(replace(block, pinned=NEURONS + 1) for block in opened.info.blocks)
        write_placement(wrong, replace(opened.info, blocks=blocks), opened.blocks, opened.ordering_sequences)
    outcome = neuralink("relayout", model, "--placement", wrong, "-o", outputs / "out")
    assert (outcome.code, outcome.error) == (3, f"{wrong}: layers.0 pins {NEURONS + 1} neurons but has only {NEURONS}")
    assert not any(outputs.iterdir())


def test_other_wrong_placements(neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory) -> None:
    model, placement = layouts.checkpoint()
    _, of_other = layouts.checkpoint(seed=7)
    trace = write_random_trace(model, tmp_path / "trace")
    damaged = Path(shutil.copyfile(placement, tmp_path / "damaged"))
    flip(damaged, start_of(damaged, "layers.0.order") + 1)
    truncated = tmp_path / "truncated"
    truncated.write_bytes(placement.read_bytes()[:-1])
    cases: list[tuple[Path, int, str]] = [
        (tmp_path / "absent", 3, "cannot be opened (No such file or directory)"),
        (model, 3, "is a checkpoint, but a placement is needed; pass the file that `neuralink cluster` wrote"),
        (layouts.permuted().layout, 3, "is a permuted layout, but a placement is needed"),
        (model / "config.json", 3, "is not a safetensors file"),
        (model / "model.safetensors", 3, "is not a placement file (no 'neuralink' metadata)"),
        (trace, 3, "is a 'neuralink-trace' file, but a 'neuralink-placement' file is needed"),
        (damaged, 3, "is damaged: its content does not match its digest; make it again"),
        (truncated, 3, "file is truncated"),
        (of_other, 5, "was made for the model with fingerprint "),
    ]
    for path, code, complaint in cases:
        outcome = neuralink("relayout", model, "--placement", path, "-o", outputs / "out")
        assert (outcome.code, complaint in outcome.error) == (code, True), (path, outcome)
        assert outcome.error.startswith(f"{path}: ")
    assert not any(outputs.iterdir())


# Traces


def test_wrong_traces(neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory) -> None:
    model, placement = layouts.checkpoint()
    trace = write_random_trace(model, tmp_path / "trace")
    damaged = write_random_trace(model, tmp_path / "damaged", seed=3)
    flip(damaged, start_of(damaged, "layers.1.fired") + 100)
    cases: list[tuple[Path, str]] = [
        (tmp_path / "absent", "cannot be opened (No such file or directory)"),
        (placement, "is a 'neuralink-placement' file, but a 'neuralink-trace' file is needed"),
        (model / "model.safetensors", "is not a trace file (no 'neuralink' metadata)"),
        (damaged, "is damaged: its content does not match its digest; make it again"),
    ]
    for path, complaint in cases:
        for command in (("cluster", path), ("merge", trace, path)):
            outcome = neuralink(*command, "-o", outputs / "out", "-q")
            assert (outcome.code, complaint in outcome.error) == (3, True), (command, outcome)
            assert outcome.error.startswith(f"{path}: ")
    assert not any(outputs.iterdir())


def test_traces_of_two_models_do_not_merge(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory
) -> None:
    paths = [
        write_random_trace(layouts.checkpoint(seed=seed)[0], tmp_path / f"trace-{seed}", seed=seed) for seed in (0, 7)
    ]
    outcome = neuralink("merge", *paths, "-o", outputs / "out")
    assert outcome.code == 5
    assert outcome.error.startswith(f"{paths[1]}: cannot be merged with {paths[0]}: they have model ")
    assert not any(outputs.iterdir())


# Layouts


@pytest.mark.parametrize("command", ["verify", "restore"])
def test_wrong_layouts(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory, command: str
) -> None:
    model, _ = layouts.checkpoint()
    empty = tmp_path / "empty"
    empty.mkdir()
    of_file = tmp_path / "file"
    of_file.write_bytes(b"")
    broken = Path(shutil.copytree(layouts.bundled().layout, tmp_path / "broken"))
    (broken / FLASH).unlink()
    cases: list[tuple[Path, str]] = [
        (tmp_path / "absent", "no such directory; pass the directory that `relayout` wrote"),
        (of_file, "is a file, not a layout; pass the directory that `relayout` wrote"),
        (empty, "so it is not a layout; pass the directory that `relayout` wrote"),
        (model, "has neither model.flash.json nor model.permuted.json, so it is not a layout"),
        (broken, "model.flash.safetensors: cannot be opened (No such file or directory)"),
    ]
    for path, complaint in cases:
        arguments = ("verify", model, path) if command == "verify" else ("restore", path, "-o", outputs / "out")
        outcome = neuralink(*arguments)
        assert (outcome.code, complaint in outcome.error) == (3, True), (path, outcome)
        assert str(path) in outcome.error
    assert not any(outputs.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_layout_that_does_not_hold_its_source_is_exit_code_1(
    neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory, kind: str, as_json: bool
) -> None:
    made = layouts.of_kind(kind)
    copy = Path(shutil.copytree(made.layout, tmp_path / "copy"))
    path = copy / (FLASH if kind == "bundled" else "model.safetensors")
    flip(path, start_of(path, "mask") + 7)
    outcome = neuralink("verify", made.model, copy, "-q", *(["--json"] if as_json else []))
    assert outcome.code == 1
    problem = f"{copy}: tensor 'mask' differs from the source at byte 7"
    assert outcome.stderr == f"neuralink: error: {problem}\n"
    if as_json:
        assert json.loads(outcome.stdout) == {"verified": False, "problem": problem}
    else:
        assert outcome.stdout == ""


def test_a_layout_of_another_model_is_exit_code_5(neuralink: Neuralink, layouts: LayoutFactory) -> None:
    other, _ = layouts.checkpoint(seed=7)
    for kind in KINDS:
        command = ("verify", other, layouts.of_kind(kind).layout)
        outcome = neuralink(*command)
        assert outcome.code == 5
        assert "was made from the model with fingerprint " in outcome.error
        as_json = neuralink(*command, "--json")
        assert (as_json.code, as_json.stderr) == (5, outcome.stderr)
        assert json.loads(as_json.stdout) == {"verified": False, "problem": outcome.error}


def test_what_cannot_be_verified_at_all_is_no_document(
    neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory
) -> None:
    made = layouts.bundled()
    for code, model, layout in ((4, made.layout, made.layout), (3, made.model, tmp_path / "absent")):
        outcome = neuralink("verify", model, layout, "--json")
        assert (outcome.code, outcome.stdout) == (code, "")


def test_a_flash_layout_is_no_model(neuralink: Neuralink, outputs: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    outcome = neuralink("relayout", made.layout, "--placement", made.placement, "-o", outputs / "out")
    assert outcome.code == 4
    assert outcome.error.endswith(
        "is a flash layout, not a checkpoint; get the checkpoint back with `neuralink restore`"
    )
    assert not any(outputs.iterdir())


# Outputs


def test_an_existing_output_is_kept(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    trace = write_random_trace(made.model, tmp_path / "trace")
    output = tmp_path / "out"
    (tmp_path / "text.txt").write_text("some text\n")
    commands = {
        "file": [
            ("profile", made.model, "--dataset", tmp_path / "text.txt"),
            ("cluster", trace),
            ("merge", trace),
        ],
        "folder": [("relayout", made.model, "--placement", made.placement), ("restore", made.layout)],
    }
    for kind, group in commands.items():
        if kind == "file":
            output.write_bytes(b"precious")
        else:
            output.unlink()
            output.mkdir()
            (output / "precious").write_bytes(b"precious")
        before = files_of(tmp_path)
        for command in group:
            outcome = neuralink(*command, "-o", output)
            assert outcome.code == 6
            assert outcome.error == f"{output}: already exists; choose another output or pass --overwrite"
            assert files_of(tmp_path) == before
    for command in commands["folder"]:
        outcome = neuralink(*command, "-o", output, "--overwrite", "-q")
        assert outcome.code == 6
        assert "is not an earlier output of this kind, so it is not deleted; choose another output" in outcome.error
        assert files_of(tmp_path) == before


def test_a_layout_does_not_take_the_place_of_its_own_model(
    neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory
) -> None:
    """A permuted layout is a model and a layout: what it was made from could not be had back from what replaced it."""
    model = Path(shutil.copytree(layouts.permuted().layout, tmp_path / "model"))
    placement = write_random_placement(model, tmp_path / "placement")
    (tmp_path / "link").symlink_to(tmp_path)
    before = files_of(model)
    for output in (model, tmp_path / "link" / "model"):
        outcome = neuralink("relayout", model, "--placement", placement, "-o", output, "--overwrite")
        assert (outcome.code, outcome.error) == (6, f"{output}: is the model itself; choose another output")
    assert files_of(model) == before


def test_the_folder_of_the_output_must_exist(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    trace = write_random_trace(made.model, tmp_path / "trace")
    output = tmp_path / "absent" / "out"
    commands: list[tuple[object, ...]] = [
        ("cluster", trace),
        ("merge", trace),
        ("relayout", made.model, "--placement", made.placement),
        ("restore", made.layout),
    ]
    for command in commands:
        outcome = neuralink(*command, "-o", output)
        assert outcome.code == 6
        assert outcome.error == f"{output}: its folder does not exist; create {output.parent} first"
    assert not output.parent.exists()


def test_a_disk_that_is_too_small(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.bundled()
    trace = write_random_trace(made.model, tmp_path / "trace")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 1000))
    commands: list[tuple[object, ...]] = [
        ("cluster", trace),
        ("merge", trace),
        ("relayout", made.model, "--placement", made.placement),
        ("relayout", made.model, "--placement", made.placement, "--layout", "permuted"),
        ("relayout", made.model, "--placement", made.placement, "--dry-run"),
        ("restore", made.layout),
    ]
    for command in commands:
        outcome = neuralink(*command, "-o", outputs / "out", "-q")
        assert outcome.code == 6
        assert " bytes of disk, 1,000 are free; free some space or write elsewhere" in outcome.error
        assert not any(outputs.iterdir())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--alignment", "4095"), "--alignment 4095 is not a power of two up to 16777216"),
        (("--alignment", "0"), "--alignment 0 is not a power of two up to 16777216"),
        (("--layout", "permuted", "--resident", "gate"), "--resident needs --layout bundled: a permuted layout keeps"),
    ],
)
def test_options_that_make_no_sense_are_exit_code_2(
    neuralink: Neuralink, outputs: Path, layouts: LayoutFactory, options: tuple[str, ...], complaint: str
) -> None:
    model, placement = layouts.checkpoint()
    outcome = neuralink("relayout", model, "--placement", placement, "-o", outputs / "out", *options)
    assert (outcome.code, outcome.error.startswith(complaint)) == (2, True)
    assert not any(outputs.iterdir())


def test_verify_refuses_options_that_make_no_sense(neuralink: Neuralink, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    both = neuralink("verify", made.model, made.layout, "--quick", "--forward")
    assert (both.code, both.error) == (2, "--quick reads no weights, so it cannot be combined with --forward")
    textless = neuralink("verify", made.model, made.layout, "--forward")
    assert (textless.code, textless.error) == (2, "--forward needs text to run on; pass --text FILE")


def test_hostile_names_stay_on_one_line(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    tensors = {**tensors_of("opt"), "x\nneuralink: error: y\x1b[31m": tensors_of("opt")["mask"]}
    model = write_checkpoint(tmp_path / "model", tensors=tensors)
    outcome = neuralink("verify", model, layouts.bundled().layout)
    assert outcome.code == 5
    assert outcome.error
    assert set(decode(model / "model.safetensors")) == set(tensors)
    weird = tmp_path / "a\nb"
    assert neuralink("verify", weird, weird).error.startswith(f"{tmp_path}/a b: no such directory")


def test_a_directory_is_told_for_what_it_is_where_a_trace_is_needed(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, layouts: LayoutFactory
) -> None:
    made = layouts.bundled()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").touch()
    for path, what in (
        (made.layout, "is a bundled layout, but a trace is needed; pass the file that `neuralink profile` wrote"),
        (made.model, "is a checkpoint, but a trace is needed"),
        (tmp_path / "folder", "is a directory, but a trace is needed"),
    ):
        for arguments in (
            ("cluster", path, "-o", outputs / "out"),
            ("merge", path, "-o", outputs / "out"),
            ("bench", made.layout, "--trace", path),
            ("drift", made.layout, "--trace", path),
        ):
            outcome = neuralink(*arguments)
            assert (outcome.code, outcome.error.startswith(f"{path}: {what}")) == (3, True), outcome
