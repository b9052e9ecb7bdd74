"""Checkpoints of this and other libraries: reading, loading, export."""
