"""A module for each task that has scores or pictures of its own; `tasks.catalogue` lists them."""
