"""Generates text from a layout, with torch or the runtime in C, and compares it with the dense model.

Imports everything but `pipeline` and `cli`, torch and transformers included.
"""
