"""The file names of a checkpoint."""

from __future__ import annotations

import re

CONFIG_FILE = "config.json"
# Where NVIDIA's ModelOpt says how it quantised the weights.
QUANTISED_CONFIG = "hf_quant_config.json"
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
# The indexes of layouts.
FLASH_INDEX = "model.flash.json"
PERMUTED_INDEX = "model.permuted.json"
# The weights once more, in another precision.
VARIANT = re.compile(r"model\.(?!flash\.)([\w-]+?)(-\d+-of-\d+)?\.safetensors")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
