"""Seeded random input through the real commands and loaders, each case in a forked process: see `tests/kit/fuzz.py`."""
