"""Masked autoencoders (arXiv 2111.06377): an experiment framework."""
