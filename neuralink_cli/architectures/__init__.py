"""Which parts of which tensors make up the FFN blocks: descriptions in JSON, the search for blocks, inference.

Imports `checkpoint` and below; never torch.
"""
