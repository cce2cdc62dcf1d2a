"""Exports inside other libraries."""
