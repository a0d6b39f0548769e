"""What to calibrate on: the datasets, and how they become batches of tokens."""

from __future__ import annotations

DEFAULT_SEQUENCE_LENGTH = 512
