"""Benchmarks, each of which prints a table."""
