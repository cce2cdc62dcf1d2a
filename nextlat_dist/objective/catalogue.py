"""Every objective, one entry each: what it builds, its terms, what it needs, how it counts, what drafts afterwards.

The only place that tells objectives apart by name. To add one, write a module for the layer list's last layer and an
entry here; a third party's entry is an entry point of the group `nextlat_dist.objectives`. Torch-free at import: the
rules of a configuration, the plan and the doctor read it. See `config.entries`.
"""

from __future__ import annotations

from collections.abc import Mapping

from nextlat_dist.config.entries import OBJECTIVES, ObjectiveEntry, Sharding, Sizes, Term
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.sharding import decoder_layer_sharding, norm_sharding

__all__ = ["BUILT_IN", "ObjectiveEntry", "Term", "objective_entry"]

STATE_MASK = "nextlat_dist.objective.masks:state_mask"
TOKEN_MASK = "nextlat_dist.objective.masks:token_mask"


def objective_entry(name: str) -> ObjectiveEntry:
    """The entry of a built-in name, an installed entry point or, where the user passed it, `my_module:MyEntry`.

    Raises:
        UserError: there is none; the message names those that are known.
    """
    return OBJECTIVES.find(name)


def _predictor_parameters(config: RunConfig, sizes: Sizes) -> Mapping[str, int]:
    width = config.predictor_hidden_size
    return {"latent_predictor": config.predictor.entry.parameters(config.model.hidden_size, width)}


def _rollout_flops(config: RunConfig, sizes: Sizes) -> float:
    """Of each step: the predictor's 6 per weight, and the student's head: forward and input gradient, the weight's
    gradient unless it is frozen, and no gradient at all where L_kl is only logged.
    """
    objective = config.objective
    student = 2 if objective.lambda_kl == 0 else 4 if objective.stop_gradient_head else 6
    predictor = _predictor_parameters(config, sizes)["latent_predictor"]
    return objective.horizon * (6 * predictor + student * sizes.head)


def _predictor_sharding(config: RunConfig) -> Mapping[str, Sharding]:
    return {f"latent_predictor.{name}": rule for name, rule in config.predictor.entry.sharding.items()}


def _layers_parameters(config: RunConfig, sizes: Sizes) -> Mapping[str, int]:
    return {"mtp": config.objective.horizon * (sizes.layer + config.model.hidden_size)}


def _layers_flops(config: RunConfig, sizes: Sizes) -> float:
    layers = _layers_parameters(config, sizes)["mtp"]
    return 6 * layers + config.objective.horizon * (sizes.attention_flops + 6 * sizes.head)


NEXT_TOKEN = ObjectiveEntry(
    name="next_token",
    module="nextlat_dist.objective.next_token:NextTokenObjective",
    steps_ahead=lambda objective: 0,
)
NEXTLAT = ObjectiveEntry(
    name="nextlat",
    module="nextlat_dist.objective.nextlat:NextLatObjective",
    terms=(Term("hidden", "lambda_hidden", STATE_MASK), Term("kl", "lambda_kl", TOKEN_MASK)),
    reads_embedding=True,
    parts={"latent_predictor": ("latent predictor", "predictor")},
    parameters=_predictor_parameters,
    flops=_rollout_flops,
    sharding=_predictor_sharding,
    drafter="latent_predictor",
)
MTP = ObjectiveEntry(
    name="mtp",
    module="nextlat_dist.objective.mtp:MTPObjective",
    terms=(Term("mtp", "lambda_mtp", TOKEN_MASK),),
    parts={"mtp": ("mtp layers", "them")},
    parameters=_layers_parameters,
    flops=_layers_flops,
    sharding=lambda config: {
        **decoder_layer_sharding(config, "mtp.layers.*"),
        "mtp.layers.*.final_layernorm.weight": norm_sharding(config),
    },
    drafter="mtp",
)
BUILT_IN = (NEXT_TOKEN, NEXTLAT, MTP)
