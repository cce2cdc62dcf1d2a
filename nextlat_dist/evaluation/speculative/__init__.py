"""Self-speculative decoding measured: methods against each other on the same prompts."""
