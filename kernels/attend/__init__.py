"""Attention of one token over the keys and values of those before."""
