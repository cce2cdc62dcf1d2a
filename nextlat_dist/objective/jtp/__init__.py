"""Joint multi-token prediction: its objective, and Fetch."""
