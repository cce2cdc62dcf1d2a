"""Next-Latent Prediction (NextLat) pretraining: Megatron-Core layers, DeepSpeed engine, WebDataset streams.

Importing this package imports neither torch nor DeepSpeed; `nextlat_dist.data` and `nextlat_dist.config` stay free of
them.
"""
