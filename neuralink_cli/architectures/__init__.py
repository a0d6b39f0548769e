"""Which regions of which tensors make up the FFN blocks: descriptions as JSON, the search for blocks, inference.

Imports `checkpoint` and below; never torch.
"""
