"""How the numbers of weights are stored: ggml's block formats, and conversion into them and out of them.

Knows matrices and regions of a checkpoint, nothing of bundles or orders.

Imports `architectures` and below; never torch.
"""
