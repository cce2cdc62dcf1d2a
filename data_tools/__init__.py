"""The `nextlat-data` commands: from text, tar files or a task to a dataset of shards. No torch import of their own."""

from nextlat_dist import moved

moved.install()
