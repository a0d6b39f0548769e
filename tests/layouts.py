"""Layouts of small checkpoints, each made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.layout.plan import RelayoutOptions, RelayoutPlan
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting.planning import plan_relayout
from neuralink_cli.rewriting.relayout import check_output, write_layout
from neuralink_cli.rewriting.verify import VerifyReport, verify_full, verify_quick
from tests.checkpoints import write_checkpoint, write_random_placement


def relayout(
    model: Path, placement: Path, output: Path, *, overwrite: bool = False, resume: bool = False, **options: Any
) -> RelayoutPlan:
    """What the command does."""
    with Checkpoint(model) as checkpoint, Placement(placement) as opened:
        blocks = find_blocks(checkpoint, choose_architecture(describe(checkpoint)))
        plan = plan_relayout(checkpoint, blocks, opened, RelayoutOptions(**options))
        check_output(plan, output, overwrite)
        write_layout(plan, checkpoint, opened, output, overwrite=overwrite, resume=resume)
        return plan


def verify(model: Path, layout: Path, *, quick: bool = False) -> VerifyReport:
    """What the command does."""
    with Checkpoint(model) as checkpoint, open_layout(layout) as opened:
        return verify_quick(opened, checkpoint) if quick else verify_full(opened, checkpoint)


@dataclass(frozen=True)
class Made:
    """A checkpoint, a placement for it, and a layout of the two."""

    model: Path
    placement: Path
    layout: Path


@dataclass
class LayoutFactory:
    """Makes each checkpoint and each layout once, in folders that nobody may write to afterwards."""

    folder: Path
    _made: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def checkpoint(self, family: str = "opt", **options: Any) -> tuple[Path, Path]:
        """A checkpoint (options as in `write_checkpoint`) and a placement for it."""
        key = (family, *sorted(options.items()))
        if key not in self._made:
            folder = self.folder / f"checkpoint-{len(self._made)}"
            model = write_checkpoint(folder / "model", family, **options)
            self._made[key] = model, write_random_placement(model, folder / "model.placement.safetensors", seed=1)
        model, placement = self._made[key]
        return model, placement

    def bundled(self, family: str = "opt", *, resident: str = "none", alignment: int = 4096, **options: Any) -> Made:
        """A bundled layout."""
        return self._layout(family, options, layout="bundled", resident=resident, alignment=alignment)

    def permuted(self, family: str = "opt", **options: Any) -> Made:
        """A permuted layout."""
        return self._layout(family, options, layout="permuted")

    def of_kind(self, kind: str, family: str = "opt", **options: Any) -> Made:
        """A layout of a kind."""
        return self._layout(family, options, layout=kind)

    def _layout(self, family: str, of_model: dict[str, Any], **options: Any) -> Made:
        model, placement = self.checkpoint(family, **of_model)
        key = (model, *sorted(options.items()))
        if key not in self._made:
            output = self.folder / f"layout-{len(self._made)}"
            relayout(model, placement, output, **options)
            self._made[key] = Made(model, placement, output)
        made: Made = self._made[key]
        return made
