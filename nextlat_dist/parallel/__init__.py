"""Process groups and devices: the only place that knows how ranks are laid out or whether there is a GPU."""
