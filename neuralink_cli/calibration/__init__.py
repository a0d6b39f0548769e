"""Calibration data: rows of files and hub datasets, texts and images, tokenised, packed and batched.

Imports `models` and below; of transformers the tokenizers and image processors only.
"""
