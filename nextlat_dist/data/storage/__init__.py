"""Storages, local, remote and cached: where a dataset's files lie and how their bytes are read."""
