"""What measures recall on a text when a layout is planned. Imports no torch before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from neuralink_cli.calibration.text_files import read_text
from neuralink_cli.models.hf_packages import require_hf_packages
from neuralink_cli.progress import Progress, no_progress

if TYPE_CHECKING:
    from neuralink_cli.architectures.architecture import Architecture
    from neuralink_cli.checkpoint.checkpoint import Checkpoint
    from neuralink_cli.layout.plan import BundledPlan
    from neuralink_cli.layout.recall import MeasuredRecall, MeasureRecall
    from neuralink_cli.placement.placement import Placement


def recall_on_text(text: Path, tokens: int, progress: Progress = no_progress) -> MeasureRecall:
    """What runs the source of a planned layout on a text, see `measure_recall`.

    Raises:
        InputError: The text cannot be read.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    require_hf_packages("torch", "transformers")
    words = read_text(text)

    def measure(
        plan: BundledPlan, checkpoint: Checkpoint, placement: Placement, architecture: Architecture
    ) -> MeasuredRecall:
        from neuralink_cli.runtime.gate_recall import measure_recall

        return measure_recall(plan, checkpoint, placement, architecture, words, tokens=tokens, progress=progress)

    return measure
