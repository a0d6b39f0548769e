"""Calibration data: text and images from files and hub datasets, tokenized, packed and batched.

Imports `models` and below; from transformers only tokenizers and image processors.
"""
