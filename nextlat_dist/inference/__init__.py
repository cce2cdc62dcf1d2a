"""Single-device decoding with a KV cache and the latent predictor as drafter. Needs torch and transformers only."""
