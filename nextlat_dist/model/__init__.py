"""The layer list: token embedding, decoder layers, final norm, latent predictor. Knows no objective."""
