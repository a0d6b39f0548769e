"""A HuggingFace checkpoint on disk, without torch: safetensors bytes in and out, and where the FFN blocks are."""
