"""Models of rows of vectors: time series, and functions that are learned in context."""
