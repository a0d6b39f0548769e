"""The placement file: for every block the order of its neurons, and what that gains on tokens it never saw.

Imports `devices`, `activations` and below; never torch.
"""
