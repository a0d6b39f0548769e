"""Files on disk, independent of models: safetensors headers, direct I/O, durable outputs, text, JSON and schemas.

Imports the top level (errors, arrays, kernels, progress, sizes) and nothing else of the package.
"""
