"""Runs a checkpoint and its layout on the same text, and compares what they compute: outputs, perplexity, recall.

Imports `inspection` and below, torch and transformers included.
"""
