"""Evaluates checkpoints on benchmarks: each has a file; the others read, ask, score and report."""
