"""Benchmarks, one file each, and what reads, asks, scores and reports them."""
