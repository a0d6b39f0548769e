"""The trace of which neurons fired at each token: its file, its thresholds, traces merged.

Imports `calibration` and below; never torch.
"""
