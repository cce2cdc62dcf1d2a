"""A project, its ranks and its hosts for the launch scripts."""
