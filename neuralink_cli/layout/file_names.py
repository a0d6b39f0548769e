"""The names of the files of a layout."""

from __future__ import annotations

PERMUTED_INDEX = "model.permuted.json"
PERMUTED_PLACEMENT = "neuralink/placement.safetensors"
PERMUTED_ORIGINALS = "neuralink/original"

FLASH_FILE = "model.flash.safetensors"
MODEL_CARD = "README.md"
