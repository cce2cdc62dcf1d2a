"""Drafters out of a run's checkpoint: the config and tensors of each built-in kind. Exporting alone needs this."""

from __future__ import annotations

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.huggingface.drafters.format import Tensors
from nextlat_dist.huggingface.drafters.jtp import JTPConfig
from nextlat_dist.huggingface.drafters.latent_predictor import LatentPredictorConfig
from nextlat_dist.huggingface.drafters.mtp import MTPConfig
from nextlat_dist.huggingface.weights import mtp_tensors, predictor_tensors


def predictor_of_checkpoint(
    canonical: Tensors, run: RunConfig, base_sha256: str
) -> tuple[LatentPredictorConfig, Tensors]:
    config = LatentPredictorConfig(
        hidden_size=run.model.hidden_size,
        predictor_hidden_size=run.predictor_hidden_size,
        vocab_size=run.model.vocab_size,
        horizon=run.objective.horizon,
        layer_norm_epsilon=run.predictor.entry.norm_epsilon,
        base_weights_sha256=base_sha256,
        fusion=run.predictor.fusion,
    )
    return config, predictor_tensors(canonical)


def mtp_of_checkpoint(canonical: Tensors, run: RunConfig, base_sha256: str) -> tuple[MTPConfig, Tensors]:
    sizes = (run.model.hidden_size, run.model.vocab_size, run.objective.horizon)
    return MTPConfig(*sizes, base_sha256), mtp_tensors(canonical, run)


def jtp_of_checkpoint(canonical: Tensors, run: RunConfig, base_sha256: str) -> tuple[JTPConfig, Tensors]:
    return JTPConfig(run.model.hidden_size, run.model.vocab_size, run.objective.horizon, base_sha256), {}
