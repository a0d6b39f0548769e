"""Files are read and written in parts. Here the parts are small, so that small tensors need many of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from neuralink_cli.errors import VerificationError
from neuralink_cli.files import bulk_io, byte_file, stage_file
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting.restore import restore_layout
from neuralink_cli.streaming import output_file, pipeline
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
    monkeypatch.setattr(pipeline, "AHEAD", 3 * request.param)
    monkeypatch.setattr(pipeline, "BEHIND", 2 * request.param)
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
        restore_layout(layout, tmp_path / "restored")
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


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_larger_than_the_bundles_of_a_block_is_held(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, placement = layouts.checkpoint("llama", neurons=300, hidden=100)
    bundles, embedding = 300 * 3 * 100 * 4, 1100 * 100 * 4
    assert bundles < embedding
    sizes: list[int] = []

    def recorded(size: int) -> npt.NDArray[np.uint8]:
        sizes.append(size)
        return bulk_io.transfer_buffer(size)

    monkeypatch.setattr(pipeline, "PIECE", 4096)
    monkeypatch.setattr(pipeline, "AHEAD", 3 * 4096)
    monkeypatch.setattr(pipeline, "BEHIND", 2 * 4096)
    for module in (pipeline, output_file):
        monkeypatch.setattr(module, "transfer_buffer", recorded)
    relayout(model, placement, tmp_path / "layout", layout=kind)
    verify(model, tmp_path / "layout")
    with open_layout(tmp_path / "layout") as layout:
        restore_layout(layout, tmp_path / "restored")
    assert max(sizes) == (bundles if kind == "bundled" else bundles // 3)
    # And of those few at a time: one for each of three stages, and one that was too small before.
    assert sum(size > 4096 for size in sizes) <= 6
