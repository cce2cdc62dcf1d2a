"""Drafts of multi-token prediction: the logits of training, whatever became of the rows around, and lossless."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import load_base_weights, save_base_weights, weights_sha256
from nextlat_dist.huggingface.drafters.mtp import MTPConfig, save_mtp
from nextlat_dist.inference import load
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.mtp import MultiTokenPrediction
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.generation import Generation, Request
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration, Costs
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from nextlat_dist.inference.stopping import Stops
from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.mtp_exports import CONTEXT, HIDDEN, HORIZON, mtp_export


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(mtp_export(tmp_path_factory.mktemp("mtp")), "cpu", torch.float64)


def heads_of_training(raw: dict[str, Any], directory: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of every extra layer on rows of one document [horizon, s, b, vocab]; writes an export of the weights."""
    from nextlat_dist.huggingface.weights import llama_config, mtp_tensors, to_llama
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.model.rows import Batch

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in stack.parameters():  # attention and norms that are not nearly uniform
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        message = Batch.of(tokens, torch.zeros_like(tokens), torch.ones_like(tokens)).message
        hidden = stack.run(message, stop=-1).hidden
        objective: Any = stack.layers[-1]
        heads = torch.stack([objective.output_layer.logits(layer((hidden, message))[0]) for layer in objective.layers])
    canonical = {name: parameter.detach() for name, parameter in canonical_parameters(stack)}
    base = to_llama(canonical, config)
    save_base_weights(Path(directory), base)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (Path(directory) / "config.json").write_text(json.dumps(llama_config(config, torch.float32, ids)))
    sizes = (config.model.hidden_size, config.model.vocab_size, config.objective.horizon)
    save_mtp(Path(directory), MTPConfig(*sizes, weights_sha256(base)), mtp_tensors(canonical, config))
    return heads[..., : config.model.vocab_size]


def test_logits_are_those_of_the_training_forward(tmp_path: Path, one_rank: Ranks) -> None:
    raw = jobs.tiny_config(objective={"name": "mtp", "horizon": 3})
    tokens = torch.randint(jobs.VOCAB, (2, jobs.LENGTH + 1), generator=torch.Generator().manual_seed(1))
    expected = one_rank.run(heads_of_training, raw, str(tmp_path), tokens)[0]
    decoder = load(tmp_path, "cpu", torch.float32)
    assert decoder.drafter is not None
    memory = decoder.drafter.start(2, jobs.LENGTH)
    cache = decoder.llama.new_cache(2, jobs.LENGTH)
    done = [0, 0]
    for counts in [(9, 5), (1, 1), (2, 3), (0, 6), (7, 1), (1, 2)]:  # a prompt, then settled positions of cycles
        new = torch.cat([tokens[row, done[row] : done[row] + count] for row, count in enumerate(counts)])
        states = decoder.llama.forward(new, counts, cache)
        memory.observe(states, counts, counts)
        done = [before + count for before, count in zip(done, counts, strict=True)]
        memory.begin(decoder.llama.embedding.new_empty(2, 0))
        for step in range(3):
            logits = memory.logits(torch.zeros(2, dtype=torch.int64), None)
            for row in range(2):
                wanted = expected[step, done[row] - 1, row]
                torch.testing.assert_close(logits[row], wanted, rtol=1e-3, atol=2e-4)
                assert float(wanted.std()) > 0.1


class Rows:
    """A batch that grows, shrinks and drafts at random, next to the settled states of every row that is left."""

    def __init__(self, drafter: MultiTokenPrediction, seed: int) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.drafter = drafter
        self.settled: list[torch.Tensor] = [torch.empty(0, HIDDEN, dtype=torch.float64) for _ in range(5)]
        self.memory = drafter.start(5, CONTEXT)

    def observe(self, most: int) -> None:
        counts = [self.pick.randint(1, most) for _ in self.settled]
        kept = [self.pick.randint(1, count) for count in counts]
        states = torch.randn(sum(counts), HIDDEN, generator=self.generator, dtype=torch.float64)
        parts = list(states.split(counts))
        for row, (part, keep) in enumerate(zip(parts, kept, strict=True)):
            self.settled[row] = torch.cat([self.settled[row], part[:keep].clone()])
            part[keep:] = 1e6  # rejected: out of reach
        self.memory.observe(torch.cat(parts), counts, kept)

    def draft(self) -> None:
        rows = sorted(self.pick.sample(range(len(self.settled)), self.pick.randint(1, len(self.settled))))
        everyone = len(rows) == len(self.settled)
        h = torch.stack([self.settled[row][-1] for row in rows])
        self.memory.begin(h, None if everyone and self.pick.random() < 0.5 else rows)
        kept = None
        for step in range(self.pick.randint(1, HORIZON)):
            if step and len(rows) > 1 and self.pick.random() < 0.5:
                places = sorted(self.pick.sample(range(len(rows)), len(rows) - 1))
                kept, rows = torch.tensor(places), [rows[place] for place in places]
            logits = self.memory.logits(torch.zeros(len(rows), dtype=torch.int64), kept)
            kept = None
            torch.testing.assert_close(logits, torch.stack([self.alone(row, step) for row in rows]))

    def alone(self, row: int, step: int) -> torch.Tensor:
        """What a memory drafts that knows this row only, all of it at once."""
        states = self.settled[row]
        memory = self.drafter.start(1, len(states))
        memory.observe(states, [len(states)], [len(states)])
        memory.begin(states[-1:])
        logits = [memory.logits(torch.zeros(1, dtype=torch.int64), None)[0] for _ in range(step + 1)]
        return logits[-1]

    def end_one(self) -> None:
        row, last = self.pick.randrange(len(self.settled)), len(self.settled) - 1
        if row != last:
            self.memory.move(last, row)
            self.settled[row] = self.settled[last]
        self.settled.pop()


@pytest.mark.parametrize("seed", range(4))
def test_a_row_drafts_as_if_alone_whatever_happens_around_it(decoder: Decoder, seed: int) -> None:
    assert isinstance(decoder.drafter, MultiTokenPrediction)
    rows = Rows(decoder.drafter, seed)
    rows.observe(most=12)
    rows.end_one()  # with its first token
    for cycle in range(9):
        if cycle != 4:  # a cycle without drafts leaves more to read
            rows.draft()
        rows.observe(most=HORIZON + 1)
        if cycle % 3 == 2:
            rows.end_one()


PROMPTS = [[1, 2, 3], [1], [3, 0, 2, 2, 1, 3, 0, 3, 2, 1, 0, 0, 3], [2, 2], [0, 3, 1, 3, 2, 0, 1]]


@pytest.mark.parametrize("draft_length", [1, 2])
def test_greedy_output_is_that_of_no_drafts(decoder: Decoder, draft_length: int) -> None:
    plain = decoder.generate(PROMPTS, max_new_tokens=CONTEXT, draft_length=0)
    drafted = decoder.generate(PROMPTS, max_new_tokens=CONTEXT, draft_length=draft_length)
    assert [row.token_ids for row in drafted] == [row.token_ids for row in plain]
    assert len({len(row.token_ids) for row in plain}) > 2  # rows end at different times, at the context limit
    accepted = [sum(row.accepted_by_position[step] for row in drafted) for step in range(draft_length)]
    offered = [sum(row.drafted_by_position[step] for row in drafted) for step in range(draft_length)]
    assert all(0 < some < most for some, most in zip(accepted, offered, strict=True))


COSTS = Costs({1: 0.05}, {1: {1: 1.0, 2: 1.02, 3: 1.04}})


@pytest.mark.parametrize(("draft_length", "temperature"), [(2, 0.0), (2, 0.9), ("adaptive", 0.9)])
def test_a_batch_is_its_rows_alone(decoder: Decoder, draft_length: Any, temperature: float) -> None:
    request = Request(CONTEXT, draft_length, Sampling(temperature), Stops(decoder.eos_token_ids))
    policy = None
    if draft_length == "adaptive":  # every row at its own pace
        calibration = Calibration("cpu", COSTS, [Acceptance(0.9, [0.5, 0.4], [0.0, 1.0, 0.0])])
        policy = AdaptivePolicy(calibration, temperature, 1, 2)

    def decode(prompts: list[list[int]], seeds: list[int]) -> list[Generation]:
        batch = DecodingEngine(decoder.llama, decoder.drafter, prompts, request, policy, seeds)
        list(batch.run())
        return batch.results

    seeds = list(range(5, 5 + len(PROMPTS)))
    for prompt, seed, result in zip(PROMPTS, seeds, decode(PROMPTS, seeds), strict=True):
        (alone,) = decode([prompt], [seed])
        assert alone.token_ids == result.token_ids
        assert alone.accepted_by_position == result.accepted_by_position
        assert alone.drafted_by_position == result.drafted_by_position


def test_no_more_than_its_layers(decoder: Decoder) -> None:
    with pytest.raises(UserError, match="proposes 2 tokens at most"):
        decoder.generate(PROMPTS, max_new_tokens=4, draft_length=3)
    decoder.calibration = None
    assert decoder.generate(PROMPTS[:1], max_new_tokens=8)[0].drafted_by_position[1:]  # 2 where nothing is said


def test_layers_of_other_base_weights_are_refused(tmp_path: Path) -> None:
    export = mtp_export(tmp_path)
    weights = load_base_weights(export)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_base_weights(export, weights)
    with pytest.raises(UserError, match=r"mtp belongs to base weights .*export base and predictor together again"):
        load(export)
