"""Replays traces against layouts and baselines: contenders, modelled and real reads, figures.

Imports `storage` and below; never torch.
"""
