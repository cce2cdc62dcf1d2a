"""`objective.detach_base`: the base becomes, to the bit, what `next_token` alone makes of it; the predictor learns."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, TensorReader
from nextlat_dist.config.load import config_from_dict
from nextlat_dist.errors import UserError
from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

CLIP = 0.4
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one-rank": (1, {"zero_stage": 0}, {}),
    "one-rank-whole-losses": (1, {"zero_stage": 0}, {"fused_losses": False}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 0}, {}),
    "tp2-sequence-zero1": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 1}, {}),
    "dp2-zero0": (2, {"zero_stage": 0}, {}),
    "dp2-zero1": (2, {"zero_stage": 1}, {}),
    "dp2-zero1-bf16": (2, {"zero_stage": 1}, {"precision": "bf16"}),
    "dp2-zero2": (2, {"zero_stage": 2}, {}),
    "dp2-zero3": (2, {"zero_stage": 3}, {}),
    "pp2-zero0": (2, {"pipeline_model_parallel_size": 2, "pipeline_layers": [2, 2], "zero_stage": 0}, {}),
    "pp2-zero1": (2, {"pipeline_model_parallel_size": 2, "pipeline_layers": [2, 2], "zero_stage": 1}, {}),
    "pp2-whole-losses": (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_layers": [2, 2], "zero_stage": 0},
        {"fused_losses": False},
    ),
    "pp2-bf16": (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_layers": [2, 2], "zero_stage": 1},
        {"precision": "bf16"},
    ),
}
DETACHED = {"name": "nextlat", "horizon": 3, "detach_base": True, "lambda_hidden": 50.0, "lambda_kl": 50.0}
NEXT_TOKEN = {"name": "next_token"}


def trained(raw: dict[str, Any], steps: int, poisoned: tuple[int, ...] = ()) -> dict[str, Any]:
    """Of this rank, after so many guarded steps: digests of the base's state, the predictor's, norms and verdicts.

    `poisoned`: steps at which the predictor's terms weigh NaN.
    """
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.objective.terms import term_counts
    from nextlat_dist.parallel.dims import all_reduce_sum
    from nextlat_dist.training.engine.build import build_engine
    from nextlat_dist.training.engine.master_state import local_fragments
    from nextlat_dist.training.health.guards import StepGuard
    from nextlat_dist.training.health.signals import StopRequest
    from nextlat_dist.training.state.trainer_state import ApartState

    config, dims = jobs.set_up(raw)
    engine = build_engine(config, dims)
    apart = ApartState()
    guard = StepGuard(config.guards, config.objective, dims, engine, [], StopRequest(), apart)
    train_step, poison = engine.train_step, [False]

    def poisoned_step(batches: Any, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
        if poison[0]:
            weights = torch.cat([weights[:1], weights[1:] * math.nan])
        sums: torch.Tensor = train_step(batches, weights, *rest)
        return sums

    engine.train_step = poisoned_step  # type: ignore[method-assign]
    verdicts = []
    for step in range(steps):
        batch = jobs.ragged_rows(config.training.global_batch_size, seed=step).chunk(dims.data_size)[dims.data_rank]
        counts = all_reduce_sum(term_counts(batch, config.objective), dims.data_group)
        poison[0] = step in poisoned
        verdicts.append(guard.step(batch.split(config.training.micro_batch_size), counts))
    copies = {name for name, parameter in canonical_parameters(engine.module) if engine.is_tied_copy(parameter)}
    digests, predictor = {}, {}
    for fragment in local_fragments(engine):
        for key, values in fragment.values.items():
            found = hashlib.sha256(values.numpy().tobytes()).hexdigest()
            if fragment.name.startswith("latent_predictor."):
                predictor[fragment.name, key] = found
            elif fragment.name not in copies:
                digests[fragment.name, fragment.start, key] = found
    return {
        "base": digests,
        "predictor": predictor,
        "steps": engine.optimizer_steps(),
        "apart_steps": apart.optimizer_step,
        "norms": [verdict.gradient_norm for verdict in verdicts],
        "losses": [verdict.loss for verdict in verdicts],
        "reasons": [verdict.reason for verdict in verdicts],
        "apart": [verdict.apart for verdict in verdicts],
        "last_sums": verdicts[-1].sums.tolist(),
        "tied": {
            hashlib.sha256(parameter.detach().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, parameter in canonical_parameters(engine.module)
            if name.startswith("embedding.") and dims.pipeline_size > 1
        },
    }


def config(objective: dict[str, Any], layout: str) -> dict[str, Any]:
    _, parallel, training = LAYOUTS[layout]
    raw = jobs.tiny_config(
        parallel=parallel, training={"micro_batch_size": 2, **training}, optimizer={"clip_grad": CLIP, "lr": 3e-3}
    )
    return {**raw, "objective": objective}


def ranks_of(layout: str, request: pytest.FixtureRequest) -> Ranks:
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[LAYOUTS[layout][0]])
    return ranks


def assert_twins(layout: str, steps: int, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    ranks = ranks_of(layout, request)
    twins = ranks.run(trained, config(NEXT_TOKEN, layout), steps)
    found = ranks.run(trained, config(DETACHED, layout), steps)
    for twin, own in zip(twins, found, strict=True):
        assert twin["base"]
        assert own["base"] == twin["base"]
        assert (own["norms"], own["losses"]) == (twin["norms"], twin["losses"])
        assert (own["steps"], own["apart_steps"]) == (steps, steps)
        assert not any(verdict.reason for verdict in own["apart"])
    assert sum(norm > CLIP for norm in twins[0]["norms"]) > steps / 2, "clipping is not active"
    assert sum(verdict.gradient_norm > CLIP for verdict in found[0]["apart"]) > steps / 4, "nor of the predictor"
    assert any(own["predictor"] for own in found)
    assert len({digest for own in found for digest in own["tied"]}) <= 1, "the stages' embeddings differ"
    return found


@pytest.mark.parametrize("layout", ["one-rank", "tp2-sequence-zero1", "dp2-zero2", "pp2-bf16"])
def test_the_base_is_that_of_next_token_to_the_bit(layout: str, request: pytest.FixtureRequest) -> None:
    assert_twins(layout, 30, request)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_it_is_after_many_steps(layout: str, request: pytest.FixtureRequest) -> None:
    assert_twins(layout, 200, request)


@pytest.mark.parametrize("layout", ["one-rank", "dp2-zero2", "dp2-zero3", "pp2-bf16"])
def test_a_bad_step_of_the_predictor_is_none_of_the_base(layout: str, request: pytest.FixtureRequest) -> None:
    """It is left out, and what the predictor learns after it is as if it had never been."""
    ranks, bad = ranks_of(layout, request), (2, 3)
    twins = ranks.run(trained, config(NEXT_TOKEN, layout), 6)
    found = ranks.run(trained, config(DETACHED, layout), 6, bad)
    for twin, own in zip(twins, found, strict=True):
        assert own["base"] == twin["base"]
        assert [bool(verdict.reason) for verdict in own["apart"]] == [step in bad for step in range(6)]
        assert (own["steps"], own["apart_steps"]) == (6, 4)
        assert not any(own["reasons"])
    whole = ranks.run(trained, config(DETACHED, layout), 6)
    assert [own["predictor"] for own in found] != [own["predictor"] for own in whole]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "next_token"}, "objective.name=next_token has none"),
        ({"name": "mtp"}, "objective.name=mtp has none"),
        ({"lambda_next_token": 0.0}, "leaves the base nothing to learn"),
        ({"stop_gradient_target": False}, "objective.stop_gradient_target=false moves the base"),
        ({"stop_gradient_head": False}, "objective.stop_gradient_head=false moves the base"),
    ],
)
def test_what_it_cannot_mean_is_refused(objective: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_from_dict({"objective": {**DETACHED, **objective}})


def in_pieces(raw: dict[str, Any]) -> None:
    """A run of three steps, continued to six by the same command."""
    whole = raw["training"]["train_tokens"]
    run_training({**raw, "training": {**raw["training"], "train_tokens": whole // 2}})
    run_training(raw)


def saved_state(output: Path) -> dict[str, Any]:
    checkpoint = output / "checkpoints" / "step_00000006"
    found: dict[str, Any] = {"state": json.loads((checkpoint / "trainer_state.json").read_text())}
    with TensorReader(checkpoint) as reader:
        for name in reader.names:
            for key in (WEIGHT, *MOMENTS):
                found[f"{name}/{key}"] = hashlib.sha256(reader.full(name, key).numpy().tobytes()).hexdigest()
    return found


def test_a_resume_continues_both(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    """Steps of the predictor that were left out before the checkpoint count as such after it."""
    guards = {"spike_zscore": 1e6, "window_steps": 2}
    runs = {}
    for name, job in (("whole", run_training), ("pieces", in_pieces)):
        raw = training_config(tmp_path / name, text_dataset, {"zero_stage": 1}, {})
        two_ranks.run(job, {**raw, "objective": DETACHED, "guards": guards})
        runs[name] = saved_state(tmp_path / name)
    assert runs["whole"] == runs["pieces"]
    assert runs["whole"]["state"]["apart"]["optimizer_step"] == 6
    assert len(runs["whole"]["state"]["apart"]["recent"]) == 2
    assert all("gradient_norm/latent_predictor" in line for line in logged(tmp_path / "whole").values())
    before = training_config(tmp_path / "whole", text_dataset, {"zero_stage": 1}, {})
    with pytest.raises(AssertionError, match=r"objective\.detach_base"):
        two_ranks.run(run_training, {**before, "objective": {**DETACHED, "detach_base": False}, "guards": guards})
