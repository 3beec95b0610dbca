"""Tasks of cells: rows to train on, made from seeds, and the count of what is right."""
