"""Benchmarks and side-by-side comparisons; run as `python -m benchmarks.NAME`."""
