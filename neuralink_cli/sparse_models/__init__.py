"""Models of transformers whose FFN blocks compute from flash, only with the neurons that fire.

Imports `evaluation` and below, torch and transformers included.
"""
