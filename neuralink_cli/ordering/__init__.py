"""Orders the neurons of one block: counting, linking (Algorithm 1), refinement, baselines, orders of your own.

Imports `placement` and below; never torch.
"""
