"""Runs the model on calibration data and records which neurons fire: hooks, MoE experts, several processes.

Imports `activations` and below, and torch where the model runs.
"""
