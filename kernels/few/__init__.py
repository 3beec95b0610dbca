"""Products of few rows, as decoding has them, with what stands in front of them and behind."""
