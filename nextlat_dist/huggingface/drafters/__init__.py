"""Drafters for an export's base model: the kinds there are, and how each is stored."""
