"""Which decoder layers a pipeline stage has: by cost, so that no stage keeps the others waiting. Torch-free.

The last stage also has the objective, whose FLOPs are those of several decoder layers (two for a 1.3B GPT, 25 for a
horizon of 8); splitting the layers evenly would make it the slowest by far. Every stage has a decoder layer at least.
"""

from __future__ import annotations

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.plan.counting import flops_per_token, sizes


def stage_layers(config: RunConfig) -> list[int]:
    """Decoder layers of each stage, first to last: as configured, or so that the slowest stage is as fast as can be.

    Of the splits that are equally good, the one whose last stage has most; the first stages have one more where the
    rest does not divide.
    """
    given = config.parallel.pipeline_layers
    if given is not None:
        return list(given)
    layers, stages = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    if stages == 1:
        return [layers]
    layer, objective = _costs(config)

    def slowest(last: int) -> float:
        return max(-(-(layers - last) // (stages - 1)) * layer, last * layer + objective)

    last = min(range(layers - stages + 1, 0, -1), key=slowest)
    rest, more = divmod(layers - last, stages - 1)
    return [rest + (stage < more) for stage in range(stages - 1)] + [last]


def slowest_over_mean(config: RunConfig) -> float:
    """How much longer a micro-batch takes in the slowest stage than in the mean of all, by FLOPs; 1: balanced."""
    layer, objective = _costs(config)
    costs = [count * layer for count in stage_layers(config)]
    costs[-1] += objective
    return max(costs) * len(costs) / sum(costs)


def _costs(config: RunConfig) -> tuple[float, float]:
    """FLOPs per position, forward and backward, of a decoder layer and of the objective with the output head."""
    attended = (config.data.sequence_length + 1) / 2
    units = sizes(config, attended)
    layer = 6 * units.layer + units.attention_flops
    objective = flops_per_token(config, attended) - config.model.num_layers * layer
    return layer * (4 / 3 if config.training.recompute == "full" else 1), objective


def stage_contents(config: RunConfig) -> list[str]:
    """What each stage holds."""
    texts, start = [], 0
    for size in stage_layers(config):
        texts.append(f"decoder layers {start}..{start + size - 1}")
        start += size
    texts[0] = f"token embedding, {texts[0]}"
    texts[-1] = f"{texts[-1]}, final norm, objective"
    return texts
