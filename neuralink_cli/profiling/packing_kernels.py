"""The loop over a block's signal on the CPU. One pass packs the bits of firing neurons, counts them, and finds NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from neuralink_cli.kernels import kernel, popcount

# The bits of floating-point numbers, as unsigned integers.
Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
_WIDTH = 64


def _above(_: Any, row: Any, _first: Any, _bound: Any) -> Any:
    """above(row, first, bound) -> uint64: bit j is set if row[first + j], without its sign, is greater than bound.

    Written with vectors, which every processor supports: a loop over bits would not compile to them.
    """
    lane = ir.IntType(row.dtype.bitwidth)
    vector = ir.VectorType(lane, _WIDTH)
    lanes = ir.VectorType(ir.IntType(32), _WIDTH)

    def repeat(builder: Any, value: Any) -> Any:
        undefined = ir.Constant(vector, ir.Undefined)
        single = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(single, undefined, ir.Constant(lanes, [0] * _WIDTH))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, bound = arguments
        start = builder.gep(context.make_array(signature.args[0])(context, builder, array).data, [first])
        words = builder.load(builder.bitcast(start, vector.as_pointer()), align=lane.width // 8)
        magnitudes = builder.and_(words, repeat(builder, lane((1 << (lane.width - 1)) - 1)))
        fired = builder.icmp_unsigned(">", magnitudes, repeat(builder, bound))
        return builder.bitcast(fired, ir.IntType(_WIDTH))

    return types.uint64(row, types.intp, row.dtype), generate


above: Callable[[Any, Any, Any], Any] = intrinsic(_above)


@kernel
def pack_words(
    words: Words, limit: np.unsignedinteger, infinity: np.unsignedinteger, bits: npt.NDArray[np.uint8]
) -> tuple[int, bool]:
    """Set the bits of the values whose magnitude is above `limit`; return how many, and whether all are numbers.

    Args:
        words: C-contiguous `[tokens, neurons]`.
        limit, infinity: The bits of numbers that are not negative.
        bits: The output, `[tokens, ceil(neurons / 8)]`.
    """
    tokens, neurons = words.shape
    whole = neurons - neurons % _WIDTH
    # All bits except the sign.
    unsigned = ~words.dtype.type(0) >> words.dtype.type(1)
    active = 0
    not_numbers = np.uint64(0)
    for token in range(tokens):
        row, packed = words[token], bits[token]
        for first in range(0, whole, _WIDTH):
            fired = above(row, first, limit)
            not_numbers |= above(row, first, infinity)
            active += popcount(fired)
            for byte in range(8):
                packed[first // 8 + byte] = np.uint8(fired >> np.uint64(8 * byte))
        # The rest is too short for a vector.
        packed[whole // 8 :] = 0
        for neuron in range(whole, neurons):
            magnitude = row[neuron] & unsigned
            if magnitude > limit:
                packed[neuron // 8] |= np.uint8(1) << np.uint8(neuron % 8)
                active += 1
            not_numbers |= np.uint64(magnitude > infinity)
    return active, not_numbers == 0
