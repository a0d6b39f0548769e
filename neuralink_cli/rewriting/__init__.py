"""Rewrites checkpoints as layouts, proves that a layout holds its checkpoint, and turns it back into one.

Imports `layout` and below; never torch.
"""
