"""From placement to flash layout: plan, writers, index, journal; layouts opened, verified and restored.

Imports `placement` and below; never torch.
"""
