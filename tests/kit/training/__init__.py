"""Real training runs and their ranks."""
