"""What rounding the rows that decide firing does to what fires: neurons that are missed, or read for nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.arrays import Bytes
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError
from neuralink_cli.evaluation.output_comparison import comparison_batches, run_model
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.gathering import GatheredPart, Gathering
from neuralink_cli.layout.plan import BundledPlan, FlashBlock, SourcePiece
from neuralink_cli.layout.recall import GateRecall, MeasuredRecall, decided_by_rounding, firing_rows
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.offload import weight_bytes
from neuralink_cli.placement.placement import Placement
from neuralink_cli.profiling.experts import ExpertRun, SeeExpert, experts_seen, firing_bias
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from neuralink_cli.profiling.recorder import HookedBlock
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.rewriting.decoding import rows_by_slot
from neuralink_cli.sizes import human_bytes
from neuralink_cli.streaming.pipeline import read_ahead
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS
from neuralink_cli.weight_formats.quantising import dequantise

logger = logging.getLogger(__name__)

Values = npt.NDArray[np.float32]
# Tokens of a sequence.
_LENGTH = 128


@dataclass(frozen=True)
class RoundedRows:
    """The rounded rows that decide firing in a block; `read` gives them as float32 `[n, hidden]`, by neuron."""

    block: FlashBlock
    read: Callable[[], Values]


def rows_of_layout(layout: BundledLayout) -> tuple[RoundedRows, ...]:
    """The rows that a layout holds; none if neurons do not fire by them alone."""
    if layout.index.document["signal"] != "gate":
        return ()

    def read(block: FlashBlock) -> Values:
        rows = np.empty((block.neurons, block.hidden), np.float32)
        rows[layout.order(block.id)] = rows_by_slot(layout, SourcePiece(block, firing_rows(block)))
        return rows

    return tuple(RoundedRows(block, partial(read, block)) for block in decided_by_rounding(layout.index.blocks))


def rows_of_plan(plan: BundledPlan, checkpoint: Checkpoint) -> tuple[RoundedRows, ...]:
    """The rows that a planned layout will hold: rounded here, once, as it will be when it is written."""

    @cache
    def rounded(index: int) -> Bytes:
        block = blocks[index]
        part = firing_rows(block)
        stride = BLOCK_FORMATS[part.weights].row_bytes(block.hidden)
        parts = (GatheredPart(block.source_region(part), 0, part.weights),)
        gathering = Gathering(block.id, block.neurons * stride, stride, block.dtype, parts, plan.rounding)
        made = np.empty(gathering.nbytes, np.uint8)
        with read_ahead(gathering.reads(checkpoint)) as pieces:
            gathering.fill(pieces, np.arange(block.neurons, dtype=np.int32), made, checkpoint)
        return made.reshape(block.neurons, stride)

    def read(index: int) -> Values:
        return dequantise(rounded(index), BLOCK_FORMATS[firing_rows(blocks[index]).weights])

    blocks = decided_by_rounding(plan.blocks)
    return tuple(RoundedRows(block, partial(read, index)) for index, block in enumerate(blocks))


class RecallMeter:
    """Counts what fires while the source runs.

    Args:
        rows: Of the blocks that are watched.
        checkpoint: The source.
    """

    def __init__(self, rows: Sequence[RoundedRows], checkpoint: Checkpoint, architecture: Architecture) -> None:
        self._rows = {each.block.id: each for each in rows}
        self._architecture = architecture
        self._blocks = find_blocks(checkpoint, architecture)
        self._shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
        # Of each block: neurons that fire, those of them that are found, and all that are; the signal of the first,
        # and what is lost.
        self._counts = {block: np.zeros(5) for block in self._rows}
        # The tokens that were routed to each expert.
        self._routed = {block: 0 for block, each in self._rows.items() if each.block.expert is not None}

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within the block, what the model computes is counted."""
        with ExitStack() as hooks:
            found = hooked_blocks(model, self._blocks, self._shapes, self._architecture, "gate")
            # By experts module, what counts each expert of it.
            experts: dict[int, dict[int, SeeExpert]] = {}
            modules = {}
            for block, hooked in zip(self._blocks, found, strict=True):
                if block.id not in self._rows:
                    continue
                if hooked.expert is None:
                    hook = self._counting(self._rows[block.id], hooked)
                    hooks.callback(hooked.module.register_forward_hook(hook).remove)
                else:
                    modules[id(hooked.module)] = hooked.module
                    of_module = experts.setdefault(id(hooked.module), {})
                    of_module[hooked.expert] = self._counting_expert(self._rows[block.id], hooked)
            hooks.enter_context(experts_seen([(modules[key], _seeing(each)) for key, each in experts.items()]))
            yield

    @property
    def total(self) -> GateRecall | None:
        """What was counted; None if no rows were watched, or nothing fired."""
        return _recall(sum(self._counts.values(), np.zeros(5)))

    @property
    def by_block(self) -> dict[str, GateRecall]:
        """What was counted in each block in which something fired."""
        found = {block: _recall(counts) for block, counts in self._counts.items()}
        return {block: recall for block, recall in found.items() if recall is not None}

    @property
    def routed(self) -> dict[str, int]:
        """The tokens that were routed to each expert in which something fired."""
        return {block: self._routed[block] for block in self.by_block if block in self._routed}

    def _counting(self, rows: RoundedRows, hooked: HookedBlock) -> Callable[[Any, tuple[Any, ...], torch.Tensor], None]:
        own = slice(hooked.first, hooked.first + hooked.neurons)
        block = rows.block

        def hook(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            hidden = inputs[0].reshape(-1, block.hidden)
            bias = None if getattr(module, "bias", None) is None else module.bias[own]
            self._count(rows, hooked, hidden, output[..., own].reshape(-1, block.neurons), bias)

        return hook

    def _counting_expert(self, rows: RoundedRows, hooked: HookedBlock) -> SeeExpert:
        def see(run: ExpertRun) -> None:
            self._routed[rows.block.id] += len(run.tokens)
            self._count(rows, hooked, run.states, run.gate, firing_bias(hooked.module, run.number))

        return see

    def _count(
        self,
        rows: RoundedRows,
        hooked: HookedBlock,
        hidden: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Count what fires by `values` `[tokens, neurons]`, and what by the rounded rows on the same hidden states."""
        threshold = rows.block.threshold
        # Decoded for each call, so that the rows of all blocks are never in memory together.
        weights = torch.from_numpy(rows.read()).to(hidden.device, hidden.dtype)
        rounded = linear(hidden, weights, bias)
        fires, found = (hooked.rule.fires(each, threshold) for each in (values, rounded))
        signal = hooked.rule.signal(values).abs().double()
        counted = (fires, fires & found, found, signal * fires, signal * (fires & ~found))
        self._counts[rows.block.id] += [float(each.sum()) for each in counted]


def _seeing(experts: Mapping[int, SeeExpert]) -> SeeExpert:
    """Hand each expert that runs to what counts it."""

    def see(run: ExpertRun) -> None:
        if run.number in experts:
            experts[run.number](run)

    return see


def measure_recall(
    plan: BundledPlan,
    checkpoint: Checkpoint,
    placement: Placement,
    architecture: Architecture,
    text: str,
    *,
    tokens: int = 1024,
    progress: Progress = no_progress,
) -> MeasuredRecall:
    """Run the source of a planned layout as float32, and count what fires by the rows that the layout will hold.

    The layout passes `require_measurable`. Code of its own that was ignored to make the trace is ignored here too.

    Args:
        tokens: How many of the text, at most, rounded up to sequences of 128.

    Raises:
        InputError: The model or its tokenizer cannot be loaded, the text has no tokens, or nothing fires.
        UnsupportedError: As `hooked_blocks`; or rows that cannot be rounded.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    sequences = -(-tokens // _LENGTH)
    batches = comparison_batches(checkpoint.directory, architecture, text, sequences=sequences, length=_LENGTH)
    weights = weight_bytes(checkpoint.directory, "float32")
    logger.info("to measure recall, the model runs as float32: %s of memory for its weights", human_bytes(weights))
    ignore = placement.info.model.get("code") == "ignored"
    meter = RecallMeter(rows_of_plan(plan, checkpoint), checkpoint, architecture)
    with quiet_transformers():
        ran = run_model(checkpoint.directory, batches, architecture, "cpu", "float32", False, ignore, meter.watching)
        with progress("measuring recall", sum(batch.tokens for batch in batches), "token") as advance:
            for _, batch in zip(ran, batches, strict=True):
                advance(batch.tokens)
    if meter.total is None:
        raise InputError(
            "no neuron fires on the text", where=checkpoint.directory, fix="measure recall on another text"
        )
    ids = [batch.inputs["input_ids"].astype("<i4") for batch in batches]
    digest = hashlib.sha256(b"".join(each.tobytes() for each in ids)).hexdigest()
    by_block = {block: recall.rounded() for block, recall in meter.by_block.items()}
    return MeasuredRecall(sum(each.size for each in ids), digest, meter.total.rounded(), by_block, meter.routed)


def _recall(counts: npt.NDArray[np.float64]) -> GateRecall | None:
    fired, kept, read, signal, lost = counts.tolist()
    return GateRecall(kept / fired, read / fired, lost / signal if signal else 0.0) if fired else None
