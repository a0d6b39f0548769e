"""Names of layout files, kinds of layout, and choices of what stays in DRAM. Fast to import."""

from __future__ import annotations

PERMUTED_INDEX = "model.permuted.json"
PERMUTED_PLACEMENT = "neuralink/placement.safetensors"
PERMUTED_ORIGINALS = "neuralink/original"

FLASH_FILE = "model.flash.safetensors"
MODEL_CARD = "README.md"

BUNDLED = "bundled"
PERMUTED = "permuted"
LAYOUT_KINDS = (BUNDLED, PERMUTED)

# Which rows stay out of the bundles, for DRAM: none, or the rows that decide firing.
RESIDENT_CHOICES = ("none", "gate")
