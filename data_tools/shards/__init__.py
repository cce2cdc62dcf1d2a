"""Shards: documents to tokens, written so that an interrupted run resumes."""
