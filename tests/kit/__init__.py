"""The kit that tests share: ranks, tiny models and datasets, servers, doubles."""
