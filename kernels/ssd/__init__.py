"""Mamba-2's scan in matrix products."""
