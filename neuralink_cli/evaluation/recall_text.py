"""What measures recall on a text when a layout is planned, and what it takes. Imports no torch before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from neuralink_cli.evaluation.forward_check import SEQUENCE_TOKENS, sequence_bytes
from neuralink_cli.files.text_files import read_text
from neuralink_cli.layout.recall import MeasureRecall, decided_by_rounding, firing_rows
from neuralink_cli.models.hf_packages import require_hf_packages
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.streaming import pipeline
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS

if TYPE_CHECKING:
    from neuralink_cli.architectures.architecture import Architecture
    from neuralink_cli.checkpoint.checkpoint import Checkpoint
    from neuralink_cli.layout.plan import BundledPlan
    from neuralink_cli.layout.recall import MeasuredRecall
    from neuralink_cli.placement.placement import Placement

# Of a neuron and a token: its value and that by rounded rows, whether it fires by each, and its signal as float64,
# twice more while it is summed.
_COUNTED_BYTES = 36


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
        from neuralink_cli.evaluation.gate_recall import measure_recall

        return measure_recall(plan, checkpoint, placement, architecture, words, tokens=tokens, progress=progress)

    return MeasureRecall(recall_bytes, measure)


def recall_bytes(plan: BundledPlan, checkpoint: Checkpoint) -> int:
    """The peak of memory of measuring the recall of a planned layout.

    Beside the model are in memory: the rounded rows of all blocks, those of one as float32 (or, before, what they are
    rounded from), what fires by them in a sequence, and its logits.
    """
    from neuralink_cli.profiling.preflight import comparing_needs

    rounded = source = decoded = 0
    for block in decided_by_rounding(plan.blocks):
        part = firing_rows(block)
        region = block.source_region(part)
        rounded += block.neurons * BLOCK_FORMATS[part.weights].row_bytes(block.hidden)
        source = max(source, min(pipeline.AHEAD, region.lines * region.pitch))
        decoded = max(decoded, block.neurons * (4 * block.hidden + _COUNTED_BYTES * SEQUENCE_TOKENS))
    outputs = sequence_bytes(checkpoint.config, SEQUENCE_TOKENS)
    return comparing_needs(checkpoint.directory, rounded + max(source, decoded) + outputs)
