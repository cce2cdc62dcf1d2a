"""Commit protocol and exact resume."""
