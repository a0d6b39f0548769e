"""From trace to order: counting, linking (Algorithm 1), refinement, baselines, and the placement file.

Imports `devices`, `activations.trace` and below; never torch.
"""
