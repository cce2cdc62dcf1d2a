"""From a configuration to an engine: the one place that composes the layer list and wraps it.

Order: layer list -> one module or pipeline -> initial weights -> optimizer -> engine. Weights are drawn before
DeepSpeed sees the module, since ZeRO-3 partitions it; they depend on the seed and on names only.
"""

from __future__ import annotations

import torch
from torch import nn

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
from nextlat_dist.model.sharding import sharding_rules
from nextlat_dist.objective.terms import number_of_terms, terms_of_parts
from nextlat_dist.parallel.device import communication_backend
from nextlat_dist.parallel.dims import ParallelDims
from nextlat_dist.plan.stages import stage_layers
from nextlat_dist.training.engine.deepspeed_config import deepspeed_config, without_extension
from nextlat_dist.training.engine.deepspeed_engine import DeepSpeedEngine
from nextlat_dist.training.engine.optimizer import build_optimizer
from nextlat_dist.training.engine.pipeline import pipeline_module
from nextlat_dist.training.engine.step_terms import StepTerms


def build_engine(config: RunConfig, dims: ParallelDims) -> DeepSpeedEngine:
    """Model, optimizer and engine of `config` on this rank.

    Raises:
        UserError: a raw DeepSpeed setting contradicts our own.
    """
    import deepspeed

    with without_extension():
        deepspeed.init_distributed(communication_backend())  # wraps the groups that exist already
    settings = deepspeed_config(config, dims.data_size)
    entries, step_terms = layer_list(config, dims, torch.float32), StepTerms()
    several_stages = dims.pipeline_size > 1
    module: nn.Module = (
        pipeline_module(entries, dims, step_terms, stage_layers(config)) if several_stages else LayerStack(entries)
    )
    initialize(module, config, dims)
    return DeepSpeedEngine(
        module,
        build_optimizer(module, config.optimizer, config.objective.apart),
        step_terms,
        dims,
        settings=settings,
        sharding=sharding_rules(config),
        terms=number_of_terms(config.objective),
        parts=len(terms_of_parts(config.objective)),
        clip_grad=config.optimizer.clip_grad,
    )
