"""The shared parts of measuring commands: the report, its text, JSON and pictures, numbers over runs, options."""
