"""The forms of latent predictor: the built-in entries for `predictor.fusion`. Torch-free; see `config.entries`."""

from __future__ import annotations

from nextlat_dist.config.entries import PredictorEntry, Sharding

CONCAT = PredictorEntry(
    name="concat",
    module="nextlat_dist.model.latent_predictor:LatentPredictor",
    drafting="nextlat_dist.inference.drafters.latent_predictor:concat_step",
    parameters=lambda hidden, width: 3 * hidden * width + width**2 + 4 * hidden,
    sharding={
        "layer_norm.weight": Sharding(None),
        "layer_norm.bias": Sharding(None),
        "linear_in.weight": Sharding(0),
        "linear_mid.weight": Sharding(0),
        "linear_out.weight": Sharding(1),
    },
)
BUILT_IN = (CONCAT,)
