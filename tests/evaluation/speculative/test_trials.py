"""Turns: which prompts meet, who goes when, what is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from nextlat_dist.evaluation.speculative.trials import (
    ALL,
    HUGGING_FACE,
    LEAST_TURNS,
    NEXTLAT,
    REPETITION_ORDER,
    RIVAL,
    Cell,
    Contender,
    EncodedPrompt,
    Run,
    Side,
    added,
    first_difference,
    over_all_domains,
    plan_turns,
    repeated_share,
    take_turns,
)
from nextlat_dist.inference.generation import Generation
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.prompts import Prompt
from tests.kit.exports import random_weights, tiny_config, write_export


def prompts_of(domain: str, count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(Prompt(domain, f"{domain}{i}", "text"), [i + 3]) for i in range(count)]


def test_a_pass_holds_every_prompt_and_goes_round() -> None:
    domains = {"code": prompts_of("code", 11), "prose": prompts_of("prose", 2)}
    turns = plan_turns(domains, [1, 2, 4], [0.0, 1.0], repeats=2, seed=100)
    by_cell: dict[Cell, list[list[str]]] = {}
    for turn in turns:
        by_cell.setdefault(turn.cell, []).append(
            [row.prompt.name.removeprefix(turn.cell.domain) for row in turn.prompts]
        )
    assert len(by_cell) == 2 * 3 * 2
    assert by_cell[Cell("code", 1, 0.0)] == [[str(i)] for i in range(11)] * 2
    pairs = [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"], ["10", "0"]]
    assert by_cell[Cell("code", 2, 1.0)] == pairs * 2
    assert by_cell[Cell("prose", 4, 0.0)] == [["0", "1", "0", "1"]] * LEAST_TURNS * 2


def test_halves_are_of_prompts_and_seeds_never_meet() -> None:
    turns = plan_turns({"code": prompts_of("code", 7)}, [1, 3], [1.0], repeats=3, seed=7)
    alone = [turn for turn in turns if turn.cell.batch_size == 1]
    half_of = {(turn.prompts[0].prompt.name, turn.half) for turn in alone}
    assert sorted(half_of) == [(f"code{i}", i % 2) for i in range(7)]
    rows = [turn.seed + row for turn in turns if turn.cell.batch_size == 3 for row in range(3)]
    assert min(rows) == 7
    assert len(set(rows)) == len(rows)


def test_cells_are_interleaved() -> None:
    """At any time every cell has had about the same share of its turns."""
    turns = plan_turns({"a": prompts_of("a", 60), "b": prompts_of("b", 6)}, [1], [0.0], repeats=1, seed=0)
    assert Counter(turn.cell.domain for turn in turns[:22]) == {"a": 20, "b": 2}


def scripted(log: list[str], name: str, seconds: float, tokens: list[int]) -> Side:
    """A side that writes `tokens` after every prompt and claims to have needed `seconds` for the last row."""

    def side(prompts: list[list[int]], temperature: float, seed: int) -> Run:
        log.append(name)
        rows = []
        for row, _ in enumerate(prompts):
            spent = seconds / (len(prompts) - row)
            generation = Generation(token_ids=list(tokens), prefill_seconds=0.5, decode_seconds=spent, cycles=2)
            generation.drafted_by_position, generation.accepted_by_position = [2, 1][: row + 1], [1, 0][: row + 1]
            rows.append(generation)
        return Run(rows, seconds / 2)

    return side


def test_contenders_rotate_and_are_counted() -> None:
    log: list[str] = []
    sides = {
        Contender(NEXTLAT, 0): scripted(log, "plain", 4.0, [5, 6, 7, 8, 9]),
        Contender(NEXTLAT, 2): scripted(log, "two", 2.0, [5, 6, 7, 8, 9]),
        Contender(RIVAL, 0): scripted(log, "rival", 8.0, [1, 1, 1, 1, 1]),
        Contender(HUGGING_FACE, 0): scripted(log, "outside", 16.0, [5, 6, 7, 8, 0]),
    }
    turns = plan_turns({"code": prompts_of("code", 4), "prose": prompts_of("prose", 1)}, [1, 2], [0.0], 1, 0)
    measured = take_turns(turns, sides, {}, shown=False)
    expected = []
    for number, turn in enumerate(turns):
        names = ["plain", "two", "rival", "outside"][: 4 if turn.cell.batch_size == 1 else 3]
        first = number % len(names)
        expected += names[first:] + names[:first]
    assert log == expected
    assert not measured.differences
    (outcome, *rest) = measured.outcomes[Cell("code", 2, 0.0)][Contender(NEXTLAT, 2)]
    assert len(rest) == LEAST_TURNS - 1
    assert (outcome.tokens, outcome.later_tokens, outcome.cycles) == (10, 8, 4)
    assert (outcome.decode_seconds, outcome.prefill_seconds) == (2.0, 0.5)  # until the last row ended
    assert outcome.rate == 8 / 2.0
    assert outcome.rate_with_prefill == 10 / 2.5
    assert outcome.cpu_seconds == 1.0
    assert outcome.drafted_by_position == [4, 1]
    assert outcome.accepted_by_position == [2, 0]
    assert Contender(HUGGING_FACE, 0) not in measured.outcomes[Cell("code", 2, 0.0)]
    cells = over_all_domains(measured)
    assert len(cells[Cell(ALL, 1, 0.0)][Contender(RIVAL, 0)]) == 2 * LEAST_TURNS
    # The rival is held against its own baseline, Hugging Face against that of NextLat.
    alone = cells[Cell("code", 1, 0.0)]
    assert {c.model: sum(o.differing for o in alone[c]) for c in alone if c.draft_length == 0} == {
        NEXTLAT: 0,
        RIVAL: 0,
        HUGGING_FACE: LEAST_TURNS,
    }


def test_differences_are_looked_into_at_temperature_0_only(tmp_path: Path) -> None:
    config = tiny_config()
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu", torch.float64)
    truth = decoder.generate([[4]], max_new_tokens=4, draft_length=0, ignore_eos=True)[0].token_ids
    other = [*truth[:2], (truth[2] + 1) % 31, 0]
    sides = {
        Contender(NEXTLAT, 0): scripted([], "plain", 1.0, truth),
        Contender(NEXTLAT, 3): scripted([], "wrong", 1.0, other),
    }
    domains = {"code": [EncodedPrompt(Prompt("code", "p", "text"), [4])]}
    turns = plan_turns(domains, [2], [0.0, 1.0], 1, 0)
    found = take_turns(turns, sides, {NEXTLAT: decoder}, shown=False).differences
    assert len(found) == LEAST_TURNS * 2
    assert {(d["model"], d["draft_length"], d["batch_size"], d["position"]) for d in found} == {(NEXTLAT, 3, 2, 2)}


def test_first_difference_gives_the_base_models_gap(tmp_path: Path) -> None:
    config = tiny_config()
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu", torch.float64)
    truth = decoder.generate([[4, 5]], max_new_tokens=6, draft_length=0, ignore_eos=True)[0].token_ids
    rival = (truth[4] + 1) % 31
    found = first_difference(decoder, [4, 5], truth, [*truth[:4], rival, 0])
    ids = [4, 5, *truth[:4]]
    states = decoder.llama.forward(torch.tensor(ids), [len(ids)], decoder.llama.new_cache(1, len(ids)))
    logits = decoder.llama.logits(states)[-1]
    assert found["position"] == 4
    assert found["logit_gap"] == pytest.approx(float(logits[truth[4]] - logits[rival]), abs=1e-12)
    assert found["logit_gap"] > 0


def test_repeated_share() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(list(range(50))) == 0
    assert repeated_share([7] * 13) == pytest.approx(9 / 10)
    assert REPETITION_ORDER == 4


def test_added() -> None:
    assert added([[1, 2], [], [3]]) == [4, 2]
    assert added([[], []]) == []
