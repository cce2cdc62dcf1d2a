"""Training objectives on top of the final hidden states: next_token, nextlat and mtp."""
