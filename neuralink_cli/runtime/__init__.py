"""Runs models whose FFN weights stay in flash, and holds their outputs against the dense model's.

Imports everything but `cli`, torch and transformers included.
"""
