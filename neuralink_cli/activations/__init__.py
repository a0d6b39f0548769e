"""Runs the model on calibration data: hooks, MoE experts, thresholds, and the trace of which neurons fired.

Imports `calibration` and below, and torch where the model runs.
"""
