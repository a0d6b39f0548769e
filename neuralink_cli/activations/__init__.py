"""Calibration data through the model into a trace: who fires, token by token. The only package that imports torch."""
