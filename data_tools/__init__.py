"""The `nextlat-data` commands: stdlib, tokenizer, shard, inspect. No torch import of their own."""
