"""Attention of one token of a row, or of a few, over the keys and values of those before."""
