"""From trace to placement: blocks ordered in threads or on a Dask cluster, and the co-activation graph as a file.

Imports `ordering` and below; never torch.
"""
