"""Pipeline stages by cost: no split is better, what is given is taken, and the engine cuts what a dry run promises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from nextlat_dist.config.load import config_from_dict, load_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.config.shipped import shipped_path
from nextlat_dist.errors import UserError
from nextlat_dist.plan.counting import flops_per_token
from nextlat_dist.plan.stages import slowest_over_mean, stage_contents, stage_layers
from tests.kit import jobs
from tests.kit.harness import Ranks

OBJECTIVES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "next_token"},
    "d1": {"horizon": 1},
    "d8": {"horizon": 8},
    "mtp": {"name": "mtp", "horizon": 2},
    "jtp": {"name": "jtp", "horizon": 2},
}


def config(layers: int, stages: int, objective: dict[str, Any], **parallel: Any) -> RunConfig:
    return config_from_dict(
        {
            "model": {"num_layers": layers, "hidden_size": 128, "vocab_size": 3000},
            "objective": objective,
            "parallel": {"pipeline_model_parallel_size": stages, **parallel},
        }
    )


def slowest(found: RunConfig, split: tuple[int, ...]) -> float:
    """By taking layers away: the cost of one is what a model with one more costs."""
    without = config(1, 1, {}), config(2, 1, {})
    attended = (found.data.sequence_length + 1) / 2
    one, two = (flops_per_token(short, attended) for short in without)
    layer = two - one
    costs = [count * layer for count in split]
    costs[-1] += flops_per_token(found, attended) - found.model.num_layers * layer
    return max(costs)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (4, 4), (7, 4), (12, 3)])
def test_no_split_is_better(layers: int, stages: int, objective: str) -> None:
    found = config(layers, stages, OBJECTIVES[objective])
    chosen = stage_layers(found)
    every = [s for s in itertools.product(range(1, layers + 1), repeat=stages) if sum(s) == layers]
    assert slowest(found, tuple(chosen)) == pytest.approx(min(slowest(found, split) for split in every))
    assert chosen[:-1] == sorted(chosen[:-1], reverse=True), "the first have one more"
    assert all(count > 0 for count in chosen)
    assert sum(chosen) == layers


def of_1p3b(horizon: int, stages: int = 4) -> RunConfig:
    """The shipped configuration of 1.3B parameters."""
    overrides = [f"objective.horizon={horizon}", f"parallel.pipeline_model_parallel_size={stages}"]
    return load_config(shipped_path("fineweb_edu_1p3b"), overrides)


def test_four_stages_of_1p3b_are_balanced() -> None:
    assert slowest_over_mean(of_1p3b(1)) <= 1.10
    even = of_1p3b(1)
    even.parallel.pipeline_layers = [6, 6, 5, 5]
    assert slowest_over_mean(even) > 1.4
    # The objective alone is more than a stage's share of the whole.
    assert stage_layers(of_1p3b(8))[-1] == 1
    assert slowest_over_mean(of_1p3b(8)) > 1.5


def test_what_recomputation_costs_counts() -> None:
    none, selective, full = of_1p3b(1), of_1p3b(1), of_1p3b(1)
    selective.training.recompute, full.training.recompute = "selective", "full"
    assert stage_layers(selective) == stage_layers(none)
    assert stage_layers(full)[-1] > stage_layers(none)[-1]


def test_a_given_split_is_taken() -> None:
    found = config(7, 3, {}, pipeline_layers=[4, 1, 2])
    assert stage_layers(found) == [4, 1, 2]
    assert stage_contents(found) == [
        "token embedding, decoder layers 0..3",
        "decoder layers 4..4",
        "decoder layers 5..6, final norm, objective",
    ]


@pytest.mark.parametrize("split", [[4, 2], [4, 1, 1], [1, 1, 1, 4], [7, 0, 0], [8, -1, 0]])
def test_a_split_of_something_else_is_refused(split: list[int]) -> None:
    with pytest.raises(UserError, match=r"parallel\.pipeline_layers"):
        config(7, 3, {}, pipeline_layers=split)


def decoder_layers(raw: dict[str, Any]) -> list[str]:
    """Canonical names of the first weights of this rank's decoder layers."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.training.engine.build import build_engine

    engine = build_engine(*jobs.set_up(raw))
    return [name for name, _ in canonical_parameters(engine.module) if name.endswith("input_layernorm.weight")]


@pytest.mark.parametrize("given", [None, [1, 3]], ids=["by cost", "given"])
def test_the_engine_cuts_there(given: list[int] | None, two_ranks: Ranks) -> None:
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_layers": given}
    raw = jobs.tiny_config(parallel=parallel, training={"micro_batch_size": 4})
    held = two_ranks.run(decoder_layers, raw)
    assert [len(names) for names in held] == stage_layers(config_from_dict(raw)) == (given or [3, 1])
    assert [name for names in held for name in names] == [
        f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(4)
    ]
