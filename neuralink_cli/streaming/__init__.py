"""Large files as they stream: read ahead, hashed and written behind, resumed after a kill, estimated before they start.

Imports `files` and the top level.
"""
