"""Reading a layout: read planning, direct I/O, the reader, the DRAM cache, and probing a storage device.

Imports `layout`, `devices` and below; never torch.
"""
