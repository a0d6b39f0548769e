"""The files of a flash layout: plan, index, bundles, companions; both kinds opened and checked.

Imports `placement` and below; never torch.
"""
