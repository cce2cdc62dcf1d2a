"""Benchmarks: each prints a table and writes JSON. The top floor, like `evaluation`: nothing imports it."""
