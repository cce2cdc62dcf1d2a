"""Tars that others wrote: read once, indexed, never copied."""
