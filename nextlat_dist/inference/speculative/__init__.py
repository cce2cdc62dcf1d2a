"""Speculative decoding: how drafts are verified, and how many tokens are worth drafting."""
