"""Latent predictors fitted afterwards, on the frozen base of an export."""
