"""Masked autoencoders and classifiers."""
