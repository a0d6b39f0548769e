"""The modules that replace a block's projections: they compute only with the neurons that fire.

The model's own code runs around them as before: it calls the gate, then the up projection (or one module for the two of
them), multiplies, and calls the down projection (without a gate: up, activation, down). Values between them are in slot
order, not in that of the checkpoint; a sum over neurons does not depend on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from neuralink_cli.arrays import Slots
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.profiling.firing import FiringRule
from neuralink_cli.sparse_models.neuron_store import NeuronStore
from neuralink_cli.sparse_models.tensors import decode_bundles


@dataclass(frozen=True)
class FetchedSlots:
    """Slots of one fetch, int32 `[k]`, and the weights of their neurons `[k, parts, hidden]`."""

    slots: torch.Tensor
    weights: torch.Tensor


class FiringNeurons:
    """The neurons of a block as its modules see them: which fire, and their weights from DRAM or flash.

    Args:
        rule: Decides firing from the values of the gate (without a gate: of the activated up projection).
        at_once: Neurons whose weights are held decoded at the same time. A call in which more fire, as when a long
            prompt comes in at once, fetches and computes them in turns: exact, but blocks with a gate then read twice.
        where: The flash file, for errors.
    """

    def __init__(self, store: NeuronStore, rule: FiringRule, at_once: int, where: Path) -> None:
        self.store = store
        self.rule = rule
        self._at_once = at_once
        self._where = where

    @property
    def threshold(self) -> float:
        """Neurons fire above it."""
        return self.store.block.threshold

    def fired(self, values: torch.Tensor) -> torch.Tensor:
        """Which neurons fire: bool `[tokens, neurons]`, from values of the same shape.

        Raises:
            InputError: A value is not a number.
        """
        return self.rule.fires(values, self.threshold)

    def fetch(self, slots: torch.Tensor, like: torch.Tensor) -> Iterator[FetchedSlots]:
        """The weights of the neurons in ascending slots, int64 `[k]`, at most `at_once` at a time.

        Args:
            like: The tensor to multiply them with, which gives their dtype and device.
        """
        for part in slots.split(self._at_once):
            wanted: Slots = part.cpu().numpy().astype(np.int32)
            weights = decode_bundles(self.store.fetch(wanted), self.store.block, like.dtype, self._where)
            yield FetchedSlots(part, weights.to(like.device))

    def fits(self, slots: torch.Tensor) -> bool:
        """Whether `fetch` brings these slots in one piece."""
        return len(slots) <= self._at_once


class Projection(nn.Module):  # type: ignore[misc]
    """Replaces a Linear or Conv1D, with the attributes that a model's code may look at."""

    def __init__(self) -> None:
        super().__init__()
        # Some models initialise weights by name, or ask for their dtype: give them an empty one to find.
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.register_buffer("bias", None, persistent=False)


class ResidentRows(Projection):
    """The rows that decide firing, dense and in DRAM: gives the values of all neurons, by slot.

    Args:
        gate: Whether an up projection will ask for the values.
    """

    def __init__(self, *, gate: bool) -> None:
        super().__init__()
        self._gate = gate
        self._last = threading.local()

    def attach(self, rows: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Set the rows `[neurons, hidden]` and the bias `[neurons]`."""
        self.weight, self.bias = rows, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values `[..., neurons]` of hidden states `[..., hidden]`."""
        values = functional.linear(hidden, self.weight, self.bias)
        if self._gate:
            self._last.call = (hidden, values)
        return values

    def values_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The values that `forward` gave in this thread for these hidden states, computed again if need be."""
        seen, values = getattr(self._last, "call", (None, None))
        self._last.call = (None, None)
        if seen is hidden and values is not None:
            return values
        return functional.linear(hidden, self.weight, self.bias)


class SparseUp(Projection):
    """The up projection of a block with a gate: zero for neurons whose gate does not let them fire."""

    def __init__(self, gate: ResidentRows) -> None:
        super().__init__()
        # In a list, so that the gate is not a part of two modules.
        self._gate = [gate]
        self._last = threading.local()
        self.neurons: FiringNeurons | None = None

    def attach(self, neurons: FiringNeurons, bias: torch.Tensor | None) -> None:
        """Set where the weights come from, and the bias `[neurons]`, by slot."""
        self.neurons, self.bias = neurons, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values `[..., neurons]` of hidden states `[..., hidden]`."""
        assert self.neurons is not None
        gate = self._gate[0].values_of(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        fired = self.neurons.fired(gate.reshape(rows.shape[0], -1))
        slots = fired.any(dim=0).nonzero().squeeze(1)
        values = torch.zeros(fired.shape, dtype=hidden.dtype, device=hidden.device)
        kept = None
        for part in self.neurons.fetch(slots, rows):
            bias = None if self.bias is None else self.bias[part.slots]
            found = functional.linear(rows, part.weights[:, 0], bias)
            values[:, part.slots] = found.masked_fill_(~fired[:, part.slots], 0)
            kept = part if self.neurons.fits(slots) else None
        self._last.call = (slots, fired, kept)
        return values.reshape(*hidden.shape[:-1], -1)

    def take_fetched(self) -> tuple[torch.Tensor, torch.Tensor, FetchedSlots | None]:
        """Of the last call in this thread: slots, int64 `[k]`, what fired, and the weights if they came in one piece.

        Raises:
            UnsupportedError: There was no call.
        """
        call: tuple[torch.Tensor, torch.Tensor, FetchedSlots | None] | None = getattr(self._last, "call", None)
        self._last.call = None
        if call is None:
            raise UnsupportedError("the model calls a down projection before its up projection")
        return call


class FusedGateUp(Projection):
    """Gate and up projection in one module: gives the values of both side by side, those of up as `SparseUp`.

    Args:
        gate_first: Whether the model's code expects the gate's values before those of up.
    """

    def __init__(self, *, gate_first: bool) -> None:
        super().__init__()
        self.gate = ResidentRows(gate=True)
        self.up = SparseUp(self.gate)
        self._gate_first = gate_first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values `[..., 2 * neurons]` of hidden states `[..., hidden]`."""
        values = (self.gate(hidden), self.up(hidden))
        return torch.cat(values if self._gate_first else values[::-1], dim=-1)


class SparseDown(Projection):
    """The down projection: a sum over the neurons that fire.

    Args:
        up: The up projection of a block with a gate, which knows what fires and has fetched it; None without a gate.
    """

    def __init__(self, up: SparseUp | None) -> None:
        super().__init__()
        self._up = [] if up is None else [up]
        self.neurons: FiringNeurons | None = None

    def attach(self, neurons: FiringNeurons, bias: torch.Tensor | None) -> None:
        """Set where the weights come from, and the bias `[hidden]`."""
        self.neurons, self.bias = neurons, bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Hidden states `[..., hidden]` of the activated values `[..., neurons]`, which are by slot."""
        assert self.neurons is not None
        rows = values.reshape(-1, values.shape[-1])
        parts: Iterator[FetchedSlots]
        if self._up:
            # Where the model adds to the values of up, zeros among them are zeros no longer.
            slots, fired, kept = self._up[0].take_fetched()
            parts = iter([kept]) if kept is not None else self.neurons.fetch(slots, rows)
        else:
            fired = self.neurons.fired(rows)
            parts = self.neurons.fetch(fired.any(dim=0).nonzero().squeeze(1), rows)
        hidden = self.neurons.store.block.hidden
        output = torch.zeros((rows.shape[0], hidden), dtype=values.dtype, device=values.device)
        for part in parts:
            active = rows[:, part.slots].masked_fill_(~fired[:, part.slots], 0)
            output.addmm_(active, part.weights[:, -1])
        if self.bias is not None:
            output += self.bias
        return output.reshape(*values.shape[:-1], hidden)
