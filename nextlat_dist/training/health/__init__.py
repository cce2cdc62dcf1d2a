"""A run's health: bad steps, stalled ranks, and requests to stop."""
