"""Blocks of MXFP4: decoded, and moved from the order of a checkpoint to that of ggml. Nothing is rounded to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuralink_cli.kernels import kernel
from neuralink_cli.weight_formats.formats import BLOCK_WEIGHTS

# Twice the numbers that codes stand for, as ggml has them: without a negative zero.
_DOUBLES = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)


@kernel
def dequantise_mxfp4(data: Any, values: Any) -> None:
    """Decode blocks, uint8, to float32, 32 for each."""
    for block in range(values.size // BLOCK_WEIGHTS):
        first, last = np.uintp(block * 17), np.uintp(block * BLOCK_WEIGHTS)
        exponent = np.uint32(data[first])
        # Half of 2**(exponent - 127): below the smallest normal float32 for the two smallest.
        low, normal = (
            np.uint32(0x200000 if exponent == 0 else 0x400000),
            np.uint32(np.uint32(exponent - 1) << np.uint32(23)),
        )
        half = np.uint32(low if exponent < 2 else normal).view(np.float32)
        for j in range(np.uintp(BLOCK_WEIGHTS // 2)):
            code = data[first + np.uintp(1) + j]
            values[last + j] = half * _DOUBLES[code & np.uint8(15)]
            values[last + np.uintp(16) + j] = half * _DOUBLES[code >> np.uint8(4)]


@kernel
def carry_mxfp4(
    source: Any, pitch: int, line: int, step: int, exponents: Any, column: int, blocks: int, target: Any, place: Any
) -> int:
    """Move rows of MXFP4, with their neighbours in pairs, to blocks of ggml's, with weights 16 apart in a byte.

    Args:
        source: uint8, the codes from the first of the lines on, `pitch` bytes from one to the next.
        line: The row of `exponents`, uint8 `[rows, columns / 32]`, that belongs to the first line, and `step` how many
            rows further that of the next line is; the first of its `blocks` blocks is in column `column`.
        target: uint8, the bundles.
        place: Bytes of a bundle, where in it to write, int32 slots of the neurons, and the first neuron's number.

    Returns:
        -1, or the first block without a scale: neuron << 32 | block.
    """
    stride, offset, slots, neuron = place
    for i in range(slots.size):
        for block in range(blocks):
            at, to = np.uintp(i * pitch + block * 16), np.uintp(slots[i] * stride + offset + block * 17)
            exponent = exponents[line + i * step, column + block]
            if exponent == 255:
                return int((neuron + i) << 32 | block)
            target[to] = exponent
            for j in range(np.uintp(8)):
                low, high = source[at + j], source[at + np.uintp(8) + j]
                even, odd = to + np.uintp(1) + np.uintp(2) * j, to + np.uintp(2) + np.uintp(2) * j
                target[even] = np.uint8((low & np.uint8(15)) | np.uint8((high & np.uint8(15)) << np.uint8(4)))
                target[odd] = np.uint8((low >> np.uint8(4)) | np.uint8(high & np.uint8(240)))
    return -1
