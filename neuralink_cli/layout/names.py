"""Names of layout files, kinds of layout, and choices of what stays in DRAM. Fast to import."""

from __future__ import annotations

# A folder that no loader looks into.
OWN_FOLDER = "neuralink"
PERMUTED_PLACEMENT = f"{OWN_FOLDER}/placement.safetensors"
# Files of the source whose names the layout needs itself.
ORIGINALS = f"{OWN_FOLDER}/original"

FLASH_FILE = "model.flash.safetensors"
MODEL_CARD = "README.md"

BUNDLED = "bundled"
PERMUTED = "permuted"
LAYOUT_KINDS = (BUNDLED, PERMUTED)

# Which rows stay out of the bundles, for DRAM: none, or the rows that decide firing.
RESIDENT_CHOICES = ("none", "gate")
