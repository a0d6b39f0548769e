"""Runs a checkpoint with transformers: loading, tokenizer, model class, offloading weights that do not fit in memory.

Imports `architectures` and below, torch and transformers.
"""
