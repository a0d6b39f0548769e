"""What a run is said to hold in memory as a whole is what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.arrays import Bytes
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting.held_memory import held_while_comparing, held_while_restoring
from neuralink_cli.rewriting.planning import plan_relayout
from neuralink_cli.rewriting.restore import restore_layout
from neuralink_cli.rewriting.verify import verify_full
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.pipeline import Scratch
from tests.layouts import relayout
from tests.rewriting.test_rounded_layouts import checkpoint as checkpoint_of

ROUNDED = {"weights": "q4_0", "dense_weights": "q8_0"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """How many bytes a run asks for in all, in memory that it uses again."""
    monkeypatch.setattr(pipeline, "PIECE", 4096)
    plain = Scratch.take
    most: dict[Scratch, int] = {}

    def recorded(scratch: Scratch, size: int) -> Bytes:
        most[scratch] = max(size, most.get(scratch, 0))
        return plain(scratch, size)

    def count(run: Callable[[], object]) -> int:
        most.clear()
        run()
        return sum(most.values())

    monkeypatch.setattr(Scratch, "take", recorded)
    return count


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{}, {"resident": "gate"}, {"layout": "permuted"}, ROUNDED, {"resident": "gate", **ROUNDED}]
)
def test_what_is_held_is_what_is_asked_for(
    tmp_path: Path,
    asked: Callable[[Callable[[], object]], int],
    family: str,
    options: dict[str, Any],
) -> None:
    model, placement = checkpoint_of(tmp_path, family, "F16")
    with Checkpoint(model) as checkpoint, Placement(placement) as opened:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint)))
        planned = plan_relayout(checkpoint, blocks, opened, RelayoutOptions(**options)).held_bytes
    assert asked(lambda: relayout(model, placement, tmp_path / "layout", **options)) == planned
    with Checkpoint(model) as checkpoint, open_layout(tmp_path / "layout") as layout:
        assert asked(lambda: verify_full(layout, checkpoint)) == held_while_comparing(layout, checkpoint)
        if layout.exact:
            [header] = layout.source_headers.values()
            assert asked(lambda: restore_layout(layout, tmp_path / "out")) == held_while_restoring(layout, header)
