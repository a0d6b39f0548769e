"""Files that change under a run: each is opened once, and a layout that was replaced is said to be that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.files.durable import _exchange_atomically
from neuralink_cli.layout import open_layout
from neuralink_cli.rewriting import permuting, relayout, restore
from tests.checkpoints import write_random_placement
from tests.damage import KINDS
from tests.layouts import LayoutFactory, verify
from tests.layouts import relayout as write_layout


def swapping(function: Callable[..., Any], layout: Path, other: Path) -> Callable[..., Any]:
    """The function, but before it runs the layout is replaced, as `--overwrite` does it."""

    def swapped(*arguments: Any, **options: Any) -> Any:
        if other.exists():
            assert _exchange_atomically(bytes(other), bytes(layout))
            shutil.rmtree(other)
        return function(*arguments, **options)

    return swapped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["verify", "restore"])
def test_a_layout_replaced_while_it_is_read_is_no_wrong_layout(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch, kind: str, stage: str
) -> None:
    made = layouts.of_kind(kind)
    layout = Path(shutil.copytree(made.layout, tmp_path / "layout"))
    other_kind = "permuted" if kind == "bundled" else "bundled"
    other = Path(shutil.copytree(layouts.of_kind(other_kind).layout, tmp_path / "other"))
    from neuralink_cli.rewriting import verify as verify_module

    if stage == "verify":
        monkeypatch.setattr(verify_module, "verify_quick", swapping(verify_module.verify_quick, layout, other))
        with pytest.raises(InputError, match="was replaced while it was being read"):
            verify_module.verify(made.model, layout)
    else:
        monkeypatch.setattr(restore, "check_weight_files", swapping(open_layout.check_weight_files, layout, other))
        with pytest.raises(InputError, match="was replaced while it was being read"):
            restore.restore(layout, tmp_path / "restored")
        assert not (tmp_path / "restored").exists()


def test_a_placement_replaced_while_a_permuted_layout_is_written_makes_no_difference(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, original = layouts.checkpoint()
    placement = Path(shutil.copyfile(original, tmp_path / "placement"))
    write_random_placement(model, tmp_path / "other", seed=9)
    write_permuted = permuting.write_permuted

    def replacing(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "other").replace(placement)
        return write_permuted(*arguments, **options)

    monkeypatch.setattr(relayout, "write_permuted", replacing)
    write_layout(model, placement, tmp_path / "out", layout="permuted")
    assert verify(model, tmp_path / "out").mode == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_replaced_while_a_layout_is_written_is_read_once(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from neuralink_cli.checkpoint.checkpoint import Checkpoint

    original, placement = layouts.checkpoint()
    model = Path(shutil.copytree(original, tmp_path / "model"))
    read_beside = Checkpoint.read_beside

    def replacing(checkpoint: Checkpoint, name: str) -> bytes:
        found = read_beside(checkpoint, name)
        (model / name).write_text("a longer text than there was before, written by somebody else\n" * 9)
        return found

    monkeypatch.setattr(Checkpoint, "read_beside", replacing)
    write_layout(model, placement, tmp_path / "out", layout=kind)
    with open_layout.open_layout(tmp_path / "out") as layout:
        assert layout.verbatim["README.md"] == (original / "README.md").read_bytes()
