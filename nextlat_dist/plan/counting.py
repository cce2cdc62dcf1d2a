"""Parameter and FLOP counts from a configuration, without building anything."""

from __future__ import annotations

from nextlat_dist.config.schema import RunConfig


def parameter_counts(config: RunConfig) -> dict[str, int]:
    """Parameters by part; `base` is the exported model (real vocabulary, no padding), `total` adds the latent predictor
    or the extra layers of mtp.
    """
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_size
    kv = hidden // model.num_attention_heads * model.query_groups
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * ffn + 2 * hidden
    embedding = model.vocab_size * hidden
    head = 0 if model.tie_embeddings else embedding
    width = config.predictor_hidden_size
    objective = config.objective
    predictor = 3 * hidden * width + width**2 + 4 * hidden if objective.name == "nextlat" else 0
    mtp = objective.horizon * (layer + hidden) if objective.name == "mtp" else 0
    decoder = model.num_layers * layer + hidden
    base = embedding + decoder + head
    return {
        "embedding": embedding,
        "decoder": decoder,
        "output_layer": head,
        "base": base,
        "latent_predictor": predictor,
        "mtp": mtp,
        "total": base + predictor + mtp,
    }


def flops_per_token(config: RunConfig) -> float:
    """Model FLOPs of one training position, forward and backward, without recomputation.

    6 per matrix weight and 12 * hidden * sequence for the (full) attention scores and values of a layer. For each
    rollout step of nextlat the predictor's 6 per weight plus the student's head: forward and input gradient, the
    weight's gradient unless it is frozen, and no gradient at all where L_kl is only logged; for each extra layer of mtp
    a layer and a head.
    """
    model, objective, counts = config.model, config.objective, parameter_counts(config)
    head = model.vocab_size * model.hidden_size
    attention = 12 * model.hidden_size * config.data.sequence_length
    base = 6 * (counts["decoder"] + head) + model.num_layers * attention
    if objective.name == "mtp":
        return base + 6 * counts["mtp"] + objective.horizon * (attention + 6 * head)
    student = 2 if objective.lambda_kl == 0 else 4 if objective.stop_gradient_head else 6
    return base + objective.steps_ahead * (6 * counts["latent_predictor"] + student * head)
