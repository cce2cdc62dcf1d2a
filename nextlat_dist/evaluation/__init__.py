"""Evaluation commands and their reports."""
