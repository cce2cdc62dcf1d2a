"""Drafters: what proposes tokens from verified hidden states, one module per kind."""
