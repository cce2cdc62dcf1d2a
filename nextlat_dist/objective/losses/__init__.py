"""Losses over a vocabulary that is sharded over tensor-parallel ranks."""
