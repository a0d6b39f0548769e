"""What files of the pipeline are, how two of them differ, and whether a shipped order still fits its traffic.

Imports `bench` and below; never torch.
"""
