"""Parameter and FLOP counts from a configuration, without building anything."""

from __future__ import annotations

from nextlat_dist.config.entries import OBJECTIVES, Sizes
from nextlat_dist.config.schema import RunConfig


def sizes(config: RunConfig, attended: float | None = None) -> Sizes:
    """What objectives count with; `attended` as in `flops_per_token`."""
    model = config.model
    hidden = model.hidden_size
    kv = hidden // model.num_attention_heads * model.query_groups
    return Sizes(
        layer=hidden * (2 * hidden + 2 * kv) + 3 * hidden * model.ffn_size + 2 * hidden,
        head=model.vocab_size * hidden,
        attention_flops=12 * hidden * (config.data.sequence_length if attended is None else attended),
    )


def parameter_counts(config: RunConfig) -> dict[str, int]:
    """Parameters by part; `base` is the exported model (real vocabulary, no padding), `total` adds the objective's own
    parts (the latent predictor, the extra layers of mtp).
    """
    model, units = config.model, sizes(config)
    embedding = model.vocab_size * model.hidden_size
    head = 0 if model.tie_embeddings else units.head
    decoder = model.num_layers * units.layer + model.hidden_size
    base = embedding + decoder + head
    own = dict(config.objective.entry.parameters(config, units))
    return {
        "embedding": embedding,
        "decoder": decoder,
        "output_layer": head,
        "base": base,
        **{part: 0 for entry in OBJECTIVES.built_in().values() for part in entry.parts},
        **own,
        "total": base + sum(own.values()),
    }


def flops_per_token(config: RunConfig, attended: float | None = None) -> float:
    """Model FLOPs of one training position, forward and backward, without recomputation.

    6 per matrix weight and 12 * hidden * attended keys for the attention scores and values of a layer; what an
    objective adds, its entry counts.

    Args:
        attended: keys that a position attends to, in the mean: those of its document up to itself. None: a whole row,
            as a dense matrix product without a mask computes.
    """
    units = sizes(config, attended)
    layers = config.model.num_layers
    decoder = layers * units.layer + config.model.hidden_size
    base = 6 * (decoder + units.head) + layers * units.attention_flops
    return base + config.objective.entry.flops(config, units)
