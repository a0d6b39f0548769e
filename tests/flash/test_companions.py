"""The small files beside the weights: copied, checked, and only they come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuralink_cli.errors import InputError, VerificationError
from neuralink_cli.flash.layouts import open_layout
from neuralink_cli.flash.restore import restore
from tests.damage import KINDS
from tests.layouts import LayoutFactory, Made, verify


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
            restore(layout, tmp_path / "restored")
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
        restore(layout, tmp_path / "restored")
    assert not (tmp_path / "restored" / "notes.txt").exists()
