"""Rows of a batch: each is its solo run, whoever its neighbours are, and what has ended stays as it is.

Command: `pytest tests/inference/engine/test_rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.generation import Cycle, DraftLength, Generation, Piece, Request
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from nextlat_dist.inference.stopping import Stops
from tests.kit.exports import calibration, prompt_of, write_kind

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((4, 40, 1, 9, 4, 17, 2))]
SEEDS = [3, 1, 4, 1, 5, 9, 2]
STOPS = frozenset({5, 11, 20})
WAYS = [(draft_length, temperature) for draft_length in (0, 3, "adaptive") for temperature in (0.0, 1.0)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(write_kind(tmp_path_factory.mktemp("rows"), "random"), "cpu", torch.float64)


def decode(
    decoder: Decoder,
    places: Sequence[int],
    way: tuple[DraftLength, float],
    changed: dict[int, list[int]] | None = None,
) -> dict[int, Generation]:
    """The rows PROMPTS[place] of one batch, by place; adaptive decisions are those of a batch of all of them."""
    draft_length, temperature = way
    policy = None
    if draft_length == "adaptive":
        policy = AdaptivePolicy(calibration(), temperature, len(PROMPTS), None)
    request = Request(20, draft_length, Sampling(temperature), Stops(STOPS))
    prompts = [(changed or {}).get(place, PROMPTS[place]) for place in places]
    batch = DecodingEngine(decoder.llama, decoder.drafter, prompts, request, policy, [SEEDS[place] for place in places])
    for _ in batch.run():
        pass
    return dict(zip(places, batch.results, strict=True))


def same(one: Generation, other: Generation) -> bool:
    names = ("token_ids", "from_draft", "finish_reason", "cycles", "drafted_by_position", "accepted_by_position")
    return all(getattr(one, name) == getattr(other, name) for name in names)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_row_is_its_solo_run(decoder: Decoder, way: tuple[DraftLength, float]) -> None:
    everyone = range(len(PROMPTS))
    together = decode(decoder, everyone, way)
    assert len({len(generation.token_ids) for generation in together.values()}) > 2, "rows end at different times"
    for place in everyone:
        assert same(decode(decoder, [place], way)[place], together[place])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_order_of_rows_and_their_neighbours_change_nothing(
    decoder: Decoder, way: tuple[DraftLength, float]
) -> None:
    together = decode(decoder, range(len(PROMPTS)), way)
    for places in ([6, 5, 4, 3, 2, 1, 0], [2, 0, 6, 1, 5], [3, 1]):
        for place, generation in decode(decoder, places, way).items():
            assert same(generation, together[place])
    others = {place: prompt_of(50, 100 + place) for place in (0, 2, 3, 5)}
    changed = decode(decoder, range(len(PROMPTS)), way, others)
    for place in (1, 4, 6):
        assert same(changed[place], together[place])
    assert not all(same(changed[place], together[place]) for place in others)


@pytest.mark.parametrize("draft_length", [0, 3, "adaptive"])
def test_finished_rows_are_frozen(decoder: Decoder, draft_length: DraftLength) -> None:
    """Nothing is computed or said of a row that has ended."""
    pieces: list[Piece] = []
    cycles: list[Cycle] = []
    alive: list[set[int]] = []
    ended: set[int] = set()

    def note(piece: Piece) -> None:
        assert piece.row not in ended
        pieces.append(piece)
        if piece.token_ids[-1] in STOPS:
            ended.add(piece.row)

    def note_cycle(cycle: Cycle) -> None:
        cycles.append(cycle)
        alive.append(set(cycle.rows))

    decoder.calibration = calibration()
    results = decoder.generate(
        PROMPTS,
        max_new_tokens=20,
        draft_length=draft_length,
        temperature=1.0,
        stop_token_ids=STOPS,
        ignore_eos=True,
        on_piece=note,
        on_cycle=note_cycle,
    )
    for row, result in enumerate(results):
        own = [piece for piece in pieces if piece.row == row]
        assert [token for piece in own for token in piece.token_ids] == result.token_ids
        drafted = [i < piece.accepted for piece in own for i in range(len(piece.token_ids))]
        assert drafted == result.from_draft
        assert len(own) == result.cycles + 1
        assert [row in rows for rows in alive] == [index < result.cycles for index in range(len(alive))]
        stops = [token for token in result.token_ids if token in STOPS]
        assert stops == (result.token_ids[-1:] if result.finish_reason == "stop" else [])
        assert result.finish_reason == "stop" or len(result.token_ids) == 20
    assert len({len(result.token_ids) for result in results}) > 2, "rows end at different times"


def test_a_call_is_cut_into_batches_without_a_trace(decoder: Decoder) -> None:
    """Seeds count on over the batches of a call."""
    options = {"max_new_tokens": 15, "draft_length": 3, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    whole = decoder.generate(PROMPTS, **options)  # type: ignore[arg-type]
    rows: list[int] = []
    for size in (1, 3, 100):
        cut = decoder.generate(PROMPTS, batch_size=size, on_piece=lambda p: rows.append(p.row), **options)  # type: ignore[arg-type]
        assert all(same(one, other) for one, other in zip(cut, whole, strict=True))
        assert set(rows) == set(range(len(PROMPTS)))
        rows.clear()
    again = decoder.generate([PROMPTS[0]] * 2, **options)  # type: ignore[arg-type]
    assert again[0].token_ids != again[1].token_ids, "the same prompt twice is two samples"


def test_a_stream_is_the_row_alone(decoder: Decoder) -> None:
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 15, "draft_length": 3, "temperature": temperature, "seed": 2, "ignore_eos": True}
        pieces = list(decoder.stream(PROMPTS[1], **options))  # type: ignore[arg-type]
        (expected,) = decoder.generate([PROMPTS[1]], **options)  # type: ignore[arg-type]
        assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
        assert {piece.row for piece in pieces} == {0}
        assert sum(piece.accepted for piece in pieces) == expected.accepted
