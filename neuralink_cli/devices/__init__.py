"""What reads cost: storage device profiles, fio output, the cost of an order with access collapse.

Imports `files` and the top level, like everything below it; never torch.
"""
