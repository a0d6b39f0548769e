"""The model run on calibration data: hooks, experts, thresholds, and the trace of which neurons fired.

Imports `calibration` and below, and torch where the model runs.
"""
