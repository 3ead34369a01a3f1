"""The experiments: one module a question, each run kept as a file in `results/`."""
