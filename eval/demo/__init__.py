"""The demo: three kinds of model of one budget, side by side."""
