"""Files are read and written in parts. Here the parts are small, so that small tensors need many of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from neuralink_cli.checkpoint import bulk_io, byte_file, stage_file
from neuralink_cli.errors import VerificationError
from neuralink_cli.flash import pipeline
from neuralink_cli.flash.layouts import open_layout
from neuralink_cli.flash.restore import restore
from tests.checkpoints import files_of, write_random_placement
from tests.damage import FLASH, KINDS, flip, start_of
from tests.layouts import LayoutFactory, relayout, verify

PARTS: dict[ModuleType, str] = {
    stage_file: "_CHUNK",
    byte_file: "_MAX_READ",
    bulk_io: "_MOST",
    pipeline: "PIECE",
}


@pytest.fixture(params=[1 << 12, 1 << 13, 1 << 16])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module, name in PARTS.items():
        assert getattr(module, name) > request.param
        monkeypatch.setattr(module, name, request.param - 3 * (module is byte_file))
    monkeypatch.setattr(pipeline, "IN_FLIGHT", 3 * request.param)
    size: int = request.param
    return size


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_parts_does_not_matter(tmp_path: Path, parts: int, layouts: LayoutFactory, kind: str) -> None:
    made = layouts.of_kind(kind, "llama", neurons=300, hidden=100)
    assert (made.model / "model.safetensors").stat().st_size > parts
    relayout(made.model, made.placement, tmp_path / "layout", layout=kind)
    # A layout that was written in large parts, unless the same test came first with others.
    assert files_of(tmp_path / "layout") == files_of(made.layout)
    assert verify(made.model, tmp_path / "layout").mode == "full"
    with open_layout(tmp_path / "layout") as layout:
        restore(layout, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(made.model)
    write_random_placement(made.model, tmp_path / "placement", seed=1)
    assert (tmp_path / "placement").read_bytes() == made.placement.read_bytes()


@pytest.mark.usefixtures("parts")
def test_a_difference_in_a_later_part_is_found_where_it_is(tmp_path: Path, layouts: LayoutFactory) -> None:
    model, placement = layouts.checkpoint()
    relayout(model, placement, tmp_path / "layout")
    tensor = "model.embed_tokens.weight"
    flip(tmp_path / "layout" / FLASH, start_of(tmp_path / "layout" / FLASH, tensor) + 77_777)
    with pytest.raises(VerificationError, match=f"tensor '{tensor}' differs from the source at byte 77777"):
        verify(model, tmp_path / "layout")
