"""Runs models whose FFN weights stay in flash, and compares their outputs with the dense model's.

Imports everything but `cli`, torch and transformers included.
"""
