"""The decoding engine: rows of a batch on one device, their caches, and the model's forward pass."""
