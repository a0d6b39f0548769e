"""Bit vectors by neuron: a trace is stored token by token, but counting needs one bit vector per neuron."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neuralink_cli.errors import InputError
from neuralink_cli.kernels import kernel, popcount

Bits = npt.NDArray[np.uint64]
"""Neuron-major bit vectors, uint64[n, ceil(tokens/64)]: bit t%64 of word t//64 of row i says if i fired for token t."""

WORD = 64
TILE = 512  # tokens and neurons per tile: a tile and its transpose, 32 KiB each, stay in the cache


def transpose_bits(fired: npt.NDArray[np.uint8], n: int) -> Bits:
    """Turn a trace into neuron-major bit vectors.

    Args:
        fired: uint8[tokens, ceil(n/8)]; bit j%8 of byte j//8 of a row says whether neuron j fired.
        n: Number of neurons.

    Returns:
        uint64[n, ceil(tokens/64)]; bit t%64 of word t//64 of row j; the bits past the last token are 0.

    Raises:
        InputError: `fired` does not have this type or shape.
    """
    bits = empty_bits(n, fired.shape[0] if fired.ndim else 0)
    transpose_into(fired, bits)
    return bits


def empty_bits(n: int, tokens: int) -> Bits:
    """Bit vectors of `n` neurons over `tokens` tokens, for `transpose_into` to fill."""
    return np.empty((max(n, 0), -(-tokens // WORD)), dtype=np.uint64)


def transpose_into(fired: npt.NDArray[np.uint8], bits: Bits, first: int = 0) -> None:
    """Fill the words of neuron-major bit vectors from word `first` on with a stretch of a trace.

    Args:
        fired: As for `transpose_bits`. Only the last stretch may have a number of tokens that 64 does not divide.
        bits: uint64[n, words], written.

    Raises:
        InputError: As `transpose_bits`, or `bits` has no room for so many tokens.
    """
    n = bits.shape[0]
    if fired.dtype != np.uint8 or fired.ndim != 2 or fired.shape[1] != -(-n // 8):
        raise InputError(
            f"the trace of a block of {n} neurons must be uint8 [tokens, {-(-n // 8)}], not {fired.dtype} "
            f"{list(fired.shape)}"
        )
    if first * WORD + fired.shape[0] > bits.shape[1] * WORD:
        raise InputError(f"bit vectors of {bits.shape[1]} words do not hold {first * WORD + fired.shape[0]} tokens")
    _transpose(np.ascontiguousarray(fired), bits, first)


def activation_counts(bits: Bits) -> npt.NDArray[np.int64]:
    """Count for how many tokens each neuron fired, f(i): int64[n]."""
    counts = np.empty(bits.shape[0], dtype=np.int64)
    _count_ones(bits, counts)
    return counts


@kernel
def _transpose(fired: npt.NDArray[np.uint8], bits: Bits, first: int) -> None:
    tokens, row_bytes = fired.shape
    n = bits.shape[0]
    words = (tokens + WORD - 1) // WORD
    # Eight 64 x 64 bit matrices lie side by side in `tile`, so that each step works on eight words at once.
    tile = np.empty((WORD, TILE // WORD), dtype=np.uint64)
    tile_bytes = tile.view(np.uint8)
    done = np.empty((TILE // WORD, WORD, TILE // WORD), dtype=np.uint64)
    for first_word in range(0, words, TILE // WORD):
        depth = min(TILE // WORD, words - first_word)
        for first_byte in range(0, row_bytes, TILE // 8):
            width = min(TILE // 8, row_bytes - first_byte)
            for d in range(depth):
                first_token = (first_word + d) * WORD
                height = min(WORD, tokens - first_token)
                if width < TILE // 8 or height < WORD:
                    tile.fill(0)
                for t in range(height):
                    for b in range(width):
                        tile_bytes[t, b] = fired[first_token + t, first_byte + b]
                _transpose_tile(tile)
                for t in range(WORD):
                    for c in range(TILE // WORD):
                        done[d, t, c] = tile[t, c]
            for neuron in range(first_byte * 8, min(n, first_byte * 8 + TILE)):
                column, row = divmod(neuron - first_byte * 8, WORD)
                for d in range(depth):
                    bits[neuron, first + first_word + d] = done[d, row, column]


@kernel
def _transpose_tile(tile: Bits) -> None:
    """Transpose every column of uint64[64, 8] as a 64 x 64 bit matrix, by swapping ever smaller blocks."""
    mask = np.uint64(0x00000000FFFFFFFF)
    size = 32
    while size:
        shift = np.uint64(size)
        for start in range(0, WORD, 2 * size):
            for low in range(start, start + size):
                for c in range(TILE // WORD):
                    swap = ((tile[low, c] >> shift) ^ tile[low + size, c]) & mask
                    tile[low + size, c] ^= swap
                    tile[low, c] ^= swap << shift
        size //= 2
        mask ^= mask << np.uint64(size)


@kernel
def _count_ones(bits: Bits, counts: npt.NDArray[np.int64]) -> None:
    for i in range(bits.shape[0]):
        total = np.uint64(0)
        for word in bits[i]:
            total += popcount(word)
        counts[i] = total
