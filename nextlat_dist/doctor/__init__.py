"""Checks before a run: a sentence for each thing that is missing; nothing here imports torch at its top."""
