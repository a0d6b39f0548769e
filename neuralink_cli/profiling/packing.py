"""Packs the firing neurons of a block into bits where its signal is: with a kernel on CPUs, with torch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from neuralink_cli.activations.trace import Bits
from neuralink_cli.profiling.packing_kernels import pack_words

# Integer dtypes of the same width, for torch and for numpy. Without the sign bit, these integers sort like magnitudes:
# numbers, then infinity, then NaN.
_UNSIGNED = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
}


@dataclass(frozen=True)
class FiredBits:
    """Which neurons of a block fired. A device may still be computing it.

    `bits` is uint8 `[tokens, ceil(neurons / 8)]`, bit j % 8 of byte j // 8 being neuron j. `active` counts the bits
    that are set, `is_number` says that no value of the signal was NaN.
    """

    bits: torch.Tensor
    active: int | torch.Tensor
    is_number: bool | torch.Tensor

    def rows(self) -> Bits:
        """The bits in RAM."""
        rows: Bits = self.bits.cpu().numpy()
        return rows


def pack_fired(signal: torch.Tensor, threshold: float) -> FiredBits:
    """Which neurons fire: |s| > threshold, both as float32.

    Args:
        signal: Floating point `[tokens, neurons]`.
        threshold: At least 0.
    """
    return _pack_compiled(signal, threshold) if signal.device.type == "cpu" else pack_on_device(signal, threshold)


def pack_on_device(signal: torch.Tensor, threshold: float) -> FiredBits:
    """As `pack_fired`, with torch, without waiting for the device. Only one bit per neuron is copied to RAM."""
    fired = signal.abs().float() > threshold
    padded = torch.nn.functional.pad(fired.to(torch.uint8), (0, -fired.shape[1] % 8))
    values = 1 << torch.arange(8, dtype=torch.uint8, device=signal.device)
    bits = (padded.unflatten(1, (-1, 8)) * values).sum(dim=2, dtype=torch.uint8)
    return FiredBits(bits, torch.count_nonzero(fired), ~torch.isnan(signal).any())


def _pack_compiled(signal: torch.Tensor, threshold: float) -> FiredBits:
    if signal.dtype not in _UNSIGNED:
        signal = signal.float()
    signed, unsigned = _UNSIGNED[signal.dtype]
    words = signal.contiguous().view(signed).numpy().view(unsigned)
    bits = np.empty((words.shape[0], (words.shape[1] + 7) // 8), dtype=np.uint8)
    limit, infinity = _limit(threshold, signal.dtype), _word(float("inf"), signal.dtype)
    active, are_numbers = pack_words(words, limit, infinity, bits)
    return FiredBits(torch.from_numpy(bits), int(active), bool(are_numbers))


def _limit(threshold: float, dtype: torch.dtype) -> np.unsignedinteger:
    """The bits of the greatest number of a dtype that is not above the float32 threshold."""
    nearest = torch.tensor(threshold).to(dtype)
    word = _word(threshold, dtype)
    return word - type(word)(1) if float(nearest) > np.float32(threshold) else word


def _word(value: float, dtype: torch.dtype) -> np.unsignedinteger:
    signed, unsigned = _UNSIGNED[dtype]
    word: np.unsignedinteger = torch.tensor([value]).to(dtype).view(signed).numpy().view(unsigned)[0]
    return word
