"""Tasks of studies: the rows that cells are trained and scored on, made from seeds, and the judgement of what is right."""
