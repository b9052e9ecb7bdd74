"""Tar shards: reading, writing, caching."""
