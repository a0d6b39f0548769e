"""The names of cache policies. `storage.cache` says what they do; this module is fast to import."""

from __future__ import annotations

LINKED_S3FIFO = "linked-s3fifo"
S3FIFO = "s3fifo"
LRU = "lru"
WINDOW = "window"
NO_CACHE = "none"

POLICY_NAMES = (LINKED_S3FIFO, S3FIFO, LRU, WINDOW, NO_CACHE)
DEFAULT_POLICY = LINKED_S3FIFO
