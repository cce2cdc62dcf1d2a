"""Grids of small runs that differ in a few settings: trained, exported, evaluated and compared over seeds."""
