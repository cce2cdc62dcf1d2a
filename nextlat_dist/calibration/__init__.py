"""Calibration: what adaptive draft lengths need to know of an export and of this machine, measured and stored."""
