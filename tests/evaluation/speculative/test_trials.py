"""Trials: which prompts meet, which method runs when, what is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from nextlat_dist.evaluation.speculative.records import ALL, HUGGING_FACE, MTP, NEXTLAT, Cell, Method, added
from nextlat_dist.evaluation.speculative.trials import (
    LEAST_TRIALS,
    REPETITION_ORDER,
    Decode,
    Decoded,
    EncodedPrompt,
    first_difference,
    over_all_domains,
    plan_trials,
    repeated_share,
    run_trials,
)
from nextlat_dist.inference.generation import Generation
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.prompts import Prompt
from tests.kit.exports import random_weights, tiny_config, write_export


def prompts_of(domain: str, count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(Prompt(domain, f"{domain}{i}", "text"), [i + 3]) for i in range(count)]


def test_a_pass_holds_every_prompt_and_goes_round() -> None:
    domains = {"code": prompts_of("code", 11), "prose": prompts_of("prose", 2)}
    trials = plan_trials(domains, [1, 2, 4], [0.0, 1.0], repeats=2, seed=100)
    by_cell: dict[Cell, list[list[str]]] = {}
    for trial in trials:
        by_cell.setdefault(trial.cell, []).append(
            [row.prompt.name.removeprefix(trial.cell.domain) for row in trial.prompts]
        )
    assert len(by_cell) == 2 * 3 * 2
    assert by_cell[Cell("code", 1, 0.0)] == [[str(i)] for i in range(11)] * 2
    pairs = [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"], ["10", "0"]]
    assert by_cell[Cell("code", 2, 1.0)] == pairs * 2
    assert by_cell[Cell("prose", 4, 0.0)] == [["0", "1", "0", "1"]] * LEAST_TRIALS * 2


def test_halves_are_of_prompts_and_seeds_never_meet() -> None:
    trials = plan_trials({"code": prompts_of("code", 7)}, [1, 3], [1.0], repeats=3, seed=7)
    alone = [trial for trial in trials if trial.cell.batch_size == 1]
    half_of = {(trial.prompts[0].prompt.name, trial.half) for trial in alone}
    assert sorted(half_of) == [(f"code{i}", i % 2) for i in range(7)]
    rows = [trial.seed + row for trial in trials if trial.cell.batch_size == 3 for row in range(3)]
    assert min(rows) == 7
    assert len(set(rows)) == len(rows)


def test_cells_are_interleaved() -> None:
    """At any time every cell has had about the same share of its trials."""
    trials = plan_trials({"a": prompts_of("a", 60), "b": prompts_of("b", 6)}, [1], [0.0], repeats=1, seed=0)
    assert Counter(trial.cell.domain for trial in trials[:22]) == {"a": 20, "b": 2}


def scripted(log: list[str], name: str, seconds: float, tokens: list[int]) -> Decode:
    """A method that writes `tokens` after every prompt and claims to have needed `seconds` for the last row."""

    def decode(prompts: list[list[int]], temperature: float, seed: int) -> Decoded:
        log.append(name)
        rows = []
        for row, _ in enumerate(prompts):
            spent = seconds / (len(prompts) - row)
            generation = Generation(token_ids=list(tokens), prefill_seconds=0.5, decode_seconds=spent, cycles=2)
            generation.drafted_by_position, generation.accepted_by_position = [2, 1][: row + 1], [1, 0][: row + 1]
            rows.append(generation)
        return Decoded(rows, seconds / 2)

    return decode


def test_methods_rotate_and_are_counted() -> None:
    log: list[str] = []
    methods = {
        Method(NEXTLAT, 0): scripted(log, "plain", 4.0, [5, 6, 7, 8, 9]),
        Method(NEXTLAT, 2): scripted(log, "two", 2.0, [5, 6, 7, 8, 9]),
        Method(MTP, 0): scripted(log, "other", 8.0, [1, 1, 1, 1, 1]),
        Method(HUGGING_FACE, 0): scripted(log, "outside", 16.0, [5, 6, 7, 8, 0]),
    }
    trials = plan_trials({"code": prompts_of("code", 4), "prose": prompts_of("prose", 1)}, [1, 2], [0.0], 1, 0)
    measured = run_trials(trials, methods, {}, shown=False)
    expected = []
    for number, trial in enumerate(trials):
        names = ["plain", "two", "other", "outside"][: 4 if trial.cell.batch_size == 1 else 3]
        first = number % len(names)
        expected += names[first:] + names[:first]
    assert log == expected
    assert not measured.differences
    (outcome, *rest) = measured.outcomes[Cell("code", 2, 0.0)][Method(NEXTLAT, 2)]
    assert len(rest) == LEAST_TRIALS - 1
    assert (outcome.tokens, outcome.later_tokens, outcome.cycles) == (10, 8, 4)
    assert (outcome.decode_seconds, outcome.prefill_seconds) == (2.0, 0.5)  # until the last row ended
    assert outcome.rate == 8 / 2.0
    assert outcome.rate_with_prefill == 10 / 2.5
    assert outcome.cpu_seconds == 1.0
    assert outcome.drafted_by_position == [4, 1]
    assert outcome.accepted_by_position == [2, 0]
    assert Method(HUGGING_FACE, 0) not in measured.outcomes[Cell("code", 2, 0.0)]
    cells = over_all_domains(measured)
    assert len(cells[Cell(ALL, 1, 0.0)][Method(MTP, 0)]) == 2 * LEAST_TRIALS
    # The other export is held against its own baseline, Hugging Face against that of the main one.
    alone = cells[Cell("code", 1, 0.0)]
    assert {c.model: sum(o.differing for o in alone[c]) for c in alone if c.draft_length == 0} == {
        NEXTLAT: 0,
        MTP: 0,
        HUGGING_FACE: LEAST_TRIALS,
    }


def test_differences_are_looked_into_at_temperature_0_only(tmp_path: Path) -> None:
    config = tiny_config()
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu", torch.float64)
    truth = decoder.generate([[4]], max_new_tokens=4, draft_length=0, ignore_eos=True)[0].token_ids
    other = [*truth[:2], (truth[2] + 1) % 31, 0]
    methods = {
        Method(NEXTLAT, 0): scripted([], "plain", 1.0, truth),
        Method(NEXTLAT, 3): scripted([], "wrong", 1.0, other),
    }
    domains = {"code": [EncodedPrompt(Prompt("code", "p", "text"), [4])]}
    trials = plan_trials(domains, [2], [0.0, 1.0], 1, 0)
    found = run_trials(trials, methods, {NEXTLAT: decoder}, shown=False).differences
    assert len(found) == LEAST_TRIALS * 2
    assert {(d.method, d.cell.batch_size, d.position) for d in found} == {(Method(NEXTLAT, 3), 2, 2)}


def test_first_difference_gives_the_base_models_gap(tmp_path: Path) -> None:
    config = tiny_config()
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu", torch.float64)
    truth = decoder.generate([[4, 5]], max_new_tokens=6, draft_length=0, ignore_eos=True)[0].token_ids
    wrong = (truth[4] + 1) % 31
    position, logit_gap = first_difference(decoder, [4, 5], truth, [*truth[:4], wrong, 0])
    ids = [4, 5, *truth[:4]]
    states = decoder.llama.forward(torch.tensor(ids), [len(ids)], decoder.llama.new_cache(1, len(ids)))
    logits = decoder.llama.logits(states)[-1]
    assert position == 4
    assert logit_gap == pytest.approx(float(logits[truth[4]] - logits[wrong]), abs=1e-12)
    assert logit_gap > 0


def test_repeated_share() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(list(range(50))) == 0
    assert repeated_share([7] * 13) == pytest.approx(9 / 10)
    assert REPETITION_ORDER == 4


def test_added() -> None:
    assert added([[1, 2], [], [3]]) == [4, 2]
    assert added([[], []]) == []
