"""The `nextlat-data` commands: tokenizer, shard, inspect. No torch import."""
