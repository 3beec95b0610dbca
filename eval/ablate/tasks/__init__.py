"""What cells are trained and scored on: rows of a task, made from seeds, and what counts as right."""
