"""Benchmarks against what one would use instead, and what is written from their results."""
