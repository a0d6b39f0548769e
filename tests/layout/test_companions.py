"""The small files beside the weights: copied, checked, and only they come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.restore import restore_layout
from tests.checkpoints import files_of, write_checkpoint, write_random_placement
from tests.damage import KINDS
from tests.layouts import LayoutFactory, Made, relayout, verify


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_or_missing_file_is_found_at_once(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], tmp_path: Path, kind: str
) -> None:
    made = getattr(layouts, kind)("opt")
    copy = copy_of(made)
    with open_layout(copy) as layout:
        names = [file["name"] for file in layout.companions]
    assert "config.json" in names
    for name in names:
        if name == "config.json" and kind == "permuted":
            continue  # Another config may not even open as a checkpoint: that is found earlier.
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(VerificationError, match=f"{name}: was changed"):
            verify(made.model, copy, quick=True)
        with open_layout(copy) as layout, pytest.raises(VerificationError, match="was changed"):
            restore_layout(layout, tmp_path / "restored")
        (copy / name).unlink()
        with pytest.raises((VerificationError, InputError), match=f"{name}: is missing"):
            verify(made.model, copy, quick=True)
        (copy / name).write_bytes(content)
    assert verify(made.model, copy, quick=True).mode == "quick"
    assert not (tmp_path / "restored").exists()


def test_files_that_came_later_are_not_restored(
    layouts: LayoutFactory, copy_of: Callable[[Made], Path], tmp_path: Path
) -> None:
    copy = copy_of(layouts.bundled("opt"))
    (copy / "notes.txt").write_text("mine")
    with open_layout(copy) as layout:
        restore_layout(layout, tmp_path / "restored")
    assert not (tmp_path / "restored" / "notes.txt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_of_a_sentence_transformer_go_along(tmp_path: Path, kind: str) -> None:
    model = write_checkpoint(tmp_path / "model", "bert")
    files = {
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{ }",
        "2_Dense/model.safetensors": bytes(100),
    }
    ignored = ["original/params.json", "2_Dense/.cache", "2_Dense/deeper/config.json", "onnx/model.onnx", "x_y/z.json"]
    for name, content in [*files.items(), *((name, b"x") for name in ignored)]:
        (model / name).parent.mkdir(exist_ok=True, parents=True)
        (model / name).write_bytes(content)
    placement = write_random_placement(model, tmp_path / "placement")
    relayout(model, placement, tmp_path / "layout", layout=kind)
    verify(model, tmp_path / "layout")
    with open_layout(tmp_path / "layout") as layout:
        restore_layout(layout, tmp_path / "restored")
    expected = {name: content for name, content in files_of(model).items() if name not in ignored}
    assert files_of(tmp_path / "restored") == expected
    (tmp_path / "layout/2_Dense/config.json").write_bytes(b"{x}")
    with pytest.raises(VerificationError, match=r"2_Dense/config.json: was changed"):
        verify(model, tmp_path / "layout", quick=True)
