"""A checkpoint as transformers runs it: loading, tokenizers, classes, offloading what does not fit into memory.

Imports `architectures` and below, torch and transformers.
"""
