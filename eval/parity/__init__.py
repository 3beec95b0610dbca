"""Checkpoints against transformers' own classes."""
