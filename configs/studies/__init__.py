"""Studies: one YAML each, a question about models and the grid that answers it."""
