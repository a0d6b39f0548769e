"""What can compute a layout, and in what: the names that `run` knows. Imports nothing."""

from __future__ import annotations

TORCH, C = "torch", "c"
ENGINES = (TORCH, C)
# What rows are multiplied with: as it is, or with the runtime in C rounded where rows are in block formats.
FLOATS, ROUNDED = "f32", "int8"
ACTIVATIONS = (FLOATS, ROUNDED)
