"""Every objective, one entry each: what it builds, its terms, what it needs, how it counts, what drafts afterwards.

The only place that tells objectives apart by name. To add one, write a module for the layer list's last layer and an
entry here; a third party's entry is an entry point of the group `nextlat_dist.objectives`. Torch-free at import: the
rules of a configuration, the plan and the doctor read it. See `config.entries`.
"""

from __future__ import annotations

from collections.abc import Mapping

from nextlat_dist.config.entries import OBJECTIVES, ObjectiveEntry, Sharding, Sizes, Term
from nextlat_dist.config.schema import RunConfig, fetch_heads, swiglu_ffn_hidden_size
from nextlat_dist.errors import UserError
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
    student = 2 if not objective.ever_weighs("lambda_kl") else 4 if objective.stop_gradient_head else 6
    predictor = _predictor_parameters(config, sizes)["latent_predictor"]
    return objective.horizon * (6 * predictor + student * sizes.head)


def _predictor_sharding(config: RunConfig) -> Mapping[str, Sharding]:
    return {f"latent_predictor.{name}": rule for name, rule in config.predictor.entry.sharding.items()}


def _layers_parameters(config: RunConfig, sizes: Sizes) -> Mapping[str, int]:
    return {"mtp": config.objective.horizon * (sizes.layer + config.model.hidden_size)}


def _layers_flops(config: RunConfig, sizes: Sizes) -> float:
    layers = _layers_parameters(config, sizes)["mtp"]
    return 6 * layers + config.objective.horizon * (sizes.attention_flops + 6 * sizes.head)


def _fetch_parameters(config: RunConfig, sizes: Sizes) -> Mapping[str, int]:
    model, places = config.model, config.objective.horizon + 1
    heads = fetch_heads(model.num_attention_heads)
    return {"fetch": 4 * model.hidden_size**2 + 2 * model.hidden_size + 1 + heads * places**2}


def _fetch_flops(config: RunConfig, sizes: Sizes) -> float:
    """Matrices and head for each of the tokens; the attention among them; of the base, the head is counted already."""
    hidden, places = config.model.hidden_size, config.objective.horizon + 1
    attention = 12 * hidden * places * places
    return 6 * places * 4 * hidden**2 + attention + config.objective.horizon * 6 * sizes.head


def _fetch_sharding(config: RunConfig) -> Mapping[str, Sharding]:
    heads = fetch_heads(config.model.num_attention_heads)
    return {
        "fetch.layer_norm.weight": Sharding(None),
        "fetch.layer_norm.bias": Sharding(None),
        "fetch.scale": Sharding(None),
        "fetch.linear_qkv": Sharding(0, blocks=3, units=heads),
        "fetch.linear_proj": Sharding(1, units=heads),
        "fetch.relative_bias": Sharding(0, units=heads),
        "decoder.final_layernorm.weight": Sharding(None),  # it stands after Fetch, and sees the whole sequence
    }


def _check_fetch(config: RunConfig) -> None:
    hidden, heads = config.model.hidden_size, fetch_heads(config.model.num_attention_heads)
    if hidden % heads:
        raise UserError(
            f"model.hidden_size={hidden} does not divide into the {heads} heads of jtp's attention (at most 4, and no "
            f"more than model.num_attention_heads={config.model.num_attention_heads}); change one of them"
        )


NEXT_TOKEN = ObjectiveEntry(
    name="next_token",
    module="nextlat_dist.objective.next_token:NextTokenObjective",
    steps_ahead=lambda objective: 0,
    released=True,
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
    apart="latent_predictor",
    released=True,
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
    released=True,
)
JTP = ObjectiveEntry(
    name="jtp",
    module="nextlat_dist.objective.jtp.objective:JTPObjective",
    terms=(Term("jtp", "lambda_jtp", TOKEN_MASK),),
    reads_embedding=True,
    parts={"fetch": ("Fetch", "it")},
    parameters=_fetch_parameters,
    flops=_fetch_flops,
    sharding=_fetch_sharding,
    check=_check_fetch,
    drafter="jtp",
    next_token_trains_parts=True,
    final_norm=False,
    model_type="nextlat_jtp",
)


def _text_head_size(config: RunConfig) -> int:
    return swiglu_ffn_hidden_size(2 * config.model.hidden_size)


def _second_stack_parameters(config: RunConfig, sizes: Sizes) -> Mapping[str, int]:
    hidden = config.model.hidden_size
    return {
        "backward": config.model.num_layers * sizes.layer + hidden,
        "text_head": 3 * 2 * hidden * _text_head_size(config) + 2 * hidden,
    }


def _pairs_flops(config: RunConfig, sizes: Sizes) -> float:
    """The second stack, and of each position's pairs, as many as in a row of one document, text head and output head
    twice; of the base, the head is counted already, once.
    """
    objective, length = config.objective, config.data.sequence_length
    parts = _second_stack_parameters(config, sizes)
    longest = length if objective.largest_gap is None else min(length, objective.largest_gap)
    pairs = (
        objective.pair_rate * sum(max(0, length + 1 - gap) for gap in range(objective.least_gap, longest + 1)) / length
    )
    stack = 6 * parts["backward"] + config.model.num_layers * sizes.attention_flops
    return stack + pairs * 6 * (parts["text_head"] + 2 * sizes.head) - 6 * sizes.head


def _second_stack_sharding(config: RunConfig) -> Mapping[str, Sharding]:
    return {
        **decoder_layer_sharding(config, "backward.layers.*"),
        "backward.final_layernorm.weight": norm_sharding(config),
        "text_head.linear_fc1": Sharding(0, blocks=2),
        "text_head.linear_fc2": Sharding(1),
        "text_head.layer_norm.weight": Sharding(None),
    }


def _check_text_head(config: RunConfig) -> None:
    size, tp = _text_head_size(config), config.parallel.tensor_model_parallel_size
    if size % tp:
        raise UserError(
            f"the text head of bst has {size} inner units, 128 * round((16 * model.hidden_size / 3) / 128), which "
            f"parallel.tensor_model_parallel_size={tp} does not divide; change model.hidden_size or that"
        )


BST = ObjectiveEntry(
    name="bst",
    module="nextlat_dist.objective.bst.objective:BSTObjective",
    terms=(Term("previous", "lambda_previous", TOKEN_MASK), Term("decoded", None, TOKEN_MASK)),
    steps_ahead=lambda objective: 1,
    before="nextlat_dist.objective.bst.objective:backward_stack",
    counts="nextlat_dist.objective.bst.pairs:pair_counts",
    scale=0.5,
    next_token_trains_parts=True,
    pipeline=False,
    parts={"backward": ("backward stack", "it"), "text_head": ("text head", "it")},
    parameters=_second_stack_parameters,
    flops=_pairs_flops,
    sharding=_second_stack_sharding,
    check=_check_text_head,
    model_type="nextlat_bst",
    decoded_term="decoded",
)
BUILT_IN = (NEXT_TOKEN, NEXTLAT, MTP, JTP, BST)
