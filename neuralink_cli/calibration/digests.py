"""Digests of sequences: they tell whether two traces, or a trace and an order, saw the same tokens."""

from __future__ import annotations

import hashlib

import numpy as np

from neuralink_cli.arrays import Bytes

DIGEST_BYTES = 16


def sequence_digest(content: bytes | memoryview) -> Bytes:
    """The first 16 bytes of the SHA-256 of a sequence's content: uint8 `[16]`.

    Args:
        content: The token ids as little-endian int32; of an image, its pixel values as the model takes them.
    """
    return np.frombuffer(hashlib.sha256(content).digest()[:DIGEST_BYTES], dtype=np.uint8)
