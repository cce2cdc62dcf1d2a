"""Benchmarks: each measures a report and publishes it. Like `evaluation` nothing imports them."""
