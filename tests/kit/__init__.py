"""What tests share: ranks, tiny models and datasets, servers, doubles."""
