"""What a read costs: storage profiles, fio output, the cost of an order under access collapse.

Imports `files` and the top level, like everything below it; never torch.
"""
