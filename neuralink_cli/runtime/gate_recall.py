"""What rounding the rows that decide firing does to what fires: neurons that are missed, or read for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from neuralink_cli.activations.hooked_blocks import hooked_blocks
from neuralink_cli.activations.recorder import HookedBlock
from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.decoding import rows_by_slot
from neuralink_cli.layout.plan import BundlePart, FlashBlock, ResidentTensor, SourcePiece
from neuralink_cli.weight_formats.formats import SOURCE


@dataclass(frozen=True)
class GateRecall:
    """What fires by rounded rows, beside what fires by those of the source, on the same hidden states.

    Attributes:
        recall: Share of the neurons that fire in the source that fire by the rounded rows too.
        read_ratio: How many neurons fire by the rounded rows, over those that fire in the source.
        lost_signal: Share of the signal, summed by magnitude, of the neurons that are missed.
    """

    recall: float
    read_ratio: float
    lost_signal: float


class RecallMeter:
    """Counts what fires while the source runs. Experts, which see only some tokens, are left out.

    Args:
        source: The checkpoint that the layout was made from.
    """

    def __init__(self, layout: BundledLayout, source: Path, architecture: Architecture) -> None:
        self._layout = layout
        self._architecture = architecture
        with Checkpoint(source) as checkpoint:
            self._blocks = find_blocks(checkpoint, architecture)
            self._shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
        # Neurons that fire, those of them that are found, and all that are; the signal of the first, and what is lost.
        self._counts = np.zeros(5)

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within the block, what the model computes is counted."""
        flash = {block.id: block for block in self._layout.index.blocks}
        with ExitStack() as hooks:
            found = hooked_blocks(model, self._blocks, self._shapes, self._architecture, "gate")
            for block, hooked in zip(self._blocks, found, strict=True):
                part = _firing_rows(flash[block.id])
                if part.weights != SOURCE and hooked.expert is None:
                    hook = self._counting(flash[block.id], part, hooked)
                    hooks.callback(hooked.module.register_forward_hook(hook).remove)
            yield

    @property
    def result(self) -> GateRecall | None:
        """What was counted; None if no rows that decide firing are rounded, or nothing fired."""
        fired, kept, read, signal, lost = self._counts.tolist()
        return GateRecall(kept / fired, read / fired, lost / signal if signal else 0.0) if fired else None

    def _counting(
        self, block: FlashBlock, part: BundlePart | ResidentTensor, hooked: HookedBlock
    ) -> Callable[[Any, tuple[Any, ...], torch.Tensor], None]:
        own = slice(hooked.first, hooked.first + hooked.neurons)

        def hook(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            hidden = inputs[0].reshape(-1, block.hidden)
            # Decoded for each call, so that the rows of all blocks are never in memory together.
            rows = np.empty((block.neurons, block.hidden), np.float32)
            rows[self._layout.order(block.id)] = rows_by_slot(self._layout, SourcePiece(block, part))
            bias = None if getattr(module, "bias", None) is None else module.bias[own]
            values = output[..., own].reshape(-1, block.neurons)
            rounded = linear(hidden, torch.from_numpy(rows).to(hidden.device, hidden.dtype), bias)
            fires, found = (hooked.rule.fires(each, block.threshold) for each in (values, rounded))
            signal = hooked.rule.signal(values).abs().double()
            self._counts += [
                float(each.sum()) for each in (fires, fires & found, found, signal * fires, signal * (fires & ~found))
            ]

        return hook


def _firing_rows(block: FlashBlock) -> BundlePart | ResidentTensor:
    """The rows that decide what fires: kept apart, or the first part of the bundles."""
    return next((kept for kept in block.resident if kept.kind == "rows"), block.parts[0])
