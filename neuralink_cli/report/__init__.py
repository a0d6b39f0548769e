"""Shows what a layout gains: measurements of the bench as figures, on a page that needs no network.

Imports `bench` and below, and matplotlib (the extra `plot`) where figures are drawn.
"""
