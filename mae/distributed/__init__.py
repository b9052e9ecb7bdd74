"""Ranks, rendezvous, signals, sharding."""
