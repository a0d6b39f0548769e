"""A HuggingFace checkpoint on disk: config, shards and tensors, its fingerprint, the hub it came from.

Imports `files`; never torch.
"""
