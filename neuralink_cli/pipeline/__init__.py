"""The whole pipeline as one build: its stages, what each was made from, the lock file, and what runs again.

Imports `runtime` and below; never torch: the stages load it.
"""
