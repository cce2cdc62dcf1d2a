"""Shard format, global order, packing and the loader. No torch import."""
