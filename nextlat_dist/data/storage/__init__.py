"""Where a dataset's files lie and how their bytes are read: local, remote, cached."""
