"""One token at a time, states updated in place."""
