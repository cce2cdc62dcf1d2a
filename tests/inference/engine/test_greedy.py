"""Greedy decoding in batches is transformers' own, token by token; after every cycle the cache is a fresh prefill's.

Command: `pytest tests/inference/engine/test_greedy.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.generation import Cycle, DraftLength, Request
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from nextlat_dist.inference.stopping import Stops
from tests.kit.exports import PlannedDrafter, calibration, prompt_of, token_by_token, write_kind

NEW_TOKENS = 24
DRAFT_LENGTHS: tuple[DraftLength, ...] = (0, 1, 2, 5, 10, "adaptive")
KINDS = ("random", "wrong", "right", "half_right")
MIXED = (63, 1, 2, 30, 1, 63, 7, 2)
HUGE = 1e30


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: write_kind(tmp_path_factory.mktemp(kind), kind) for kind in ("random", "wrong", "right", "half_right")
    }


@pytest.fixture(scope="module")
def decoders(exports: dict[str, Path]) -> dict[str, Decoder]:
    found = {kind: load(path, "cpu", torch.float64) for kind, path in exports.items()}
    for decoder in found.values():
        decoder.calibration = calibration()
    return found


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [prompt_of(length, row) for row, length in enumerate(lengths)]


@cache
def continuations(export: Path, lengths: tuple[int, ...]) -> list[list[int]]:
    """What transformers makes of `prompts_of(lengths)`."""
    prompts = prompts_of(lengths)
    found: list[list[int]] = [[] for _ in lengths]
    for length in set(lengths):
        rows = [row for row, own in enumerate(lengths) if own == length]
        tokens = token_by_token(export, [prompts[row] for row in rows], NEW_TOKENS)
        for row, continuation in zip(rows, tokens, strict=True):
            found[row] = continuation
    return found


def planned(export: Path, lengths: tuple[int, ...], decoder: Decoder) -> Decoder:
    """The decoder with drafts that are right here and wrong there."""
    sequences = [[*p, *c] for p, c in zip(prompts_of(lengths), continuations(export, lengths), strict=True)]
    drafts = Decoder(decoder.opened, decoder.llama, PlannedDrafter(sequences, 31))
    drafts.calibration = decoder.calibration
    return drafts


@pytest.mark.parametrize("lengths", [*((n,) * b for n in (1, 2, 63) for b in (1, 3, 8)), MIXED[:3], MIXED], ids=str)
def test_greedy_output_is_token_by_token_decoding(
    exports: dict[str, Path], decoders: dict[str, Decoder], lengths: tuple[int, ...]
) -> None:
    expected = continuations(exports["random"], lengths)
    decoder = planned(exports["random"], lengths, decoders["random"])
    for draft_length in DRAFT_LENGTHS:
        results = decoder.generate(
            prompts_of(lengths), max_new_tokens=NEW_TOKENS, draft_length=draft_length, ignore_eos=True
        )
        assert [result.token_ids for result in results] == expected, draft_length
        accepted, drafted = (sum(getattr(result, name) for result in results) for name in ("accepted", "drafted"))
        assert (0 < accepted < drafted) == (draft_length != 0)
        for result in results:
            assert result.finish_reason == "length"
            assert result.cycles + result.accepted == NEW_TOKENS - 1
            assert sum(result.from_draft) == result.accepted
            assert len(result.from_draft) == NEW_TOKENS
            assert result.accepted_by_position == sorted(result.accepted_by_position, reverse=True)
            if isinstance(draft_length, int):
                assert len(result.drafted_by_position) == draft_length
            else:
                assert len(result.drafted_by_position) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_any_predictor_gives_the_same_tokens(exports: dict[str, Path], decoders: dict[str, Decoder], kind: str) -> None:
    expected = continuations(exports[kind], MIXED)
    for draft_length in DRAFT_LENGTHS:
        results = decoders[kind].generate(
            prompts_of(MIXED), max_new_tokens=NEW_TOKENS, draft_length=draft_length, ignore_eos=True
        )
        assert [result.token_ids for result in results] == expected, draft_length
        accepted, drafted = (sum(getattr(result, name) for result in results) for name in ("accepted", "drafted"))
        if kind == "right":
            assert accepted == drafted
        if kind == "wrong":
            assert accepted < 0.3 * max(drafted, 1)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("draft_length", [4, "adaptive"])
def test_after_every_cycle_cache_and_states_equal_a_fresh_prefill(
    exports: dict[str, Path], decoders: dict[str, Decoder], draft_length: DraftLength, temperature: float
) -> None:
    """Slots out of reach, those of rejected tokens among them, are filled with huge values: reading one would show."""
    decoder = decoders["half_right"]
    if temperature == 0:
        decoder = planned(exports["random"], MIXED, decoders["random"])
    llama, prompts = decoder.llama, prompts_of(MIXED)
    policy = AdaptivePolicy(calibration(), temperature, len(MIXED), None) if draft_length == "adaptive" else None
    # Rows end one after the other, and the last one takes the place of each.
    stops = Stops(frozenset({5, 11}))
    seen: set[int] = set()

    def check(cycle: Cycle | None) -> None:
        seen.update(cycle.accepted if cycle else ())
        assert batch.cache.lengths == [len(row.prompt) + len(row.result.token_ids) - 1 for row in batch.rows]
        for place, row in enumerate(batch.rows):
            ids = [*row.prompt, *row.result.token_ids][:-1]
            fresh = llama.new_cache(1, len(ids))
            h = llama.forward(torch.tensor(ids), [len(ids)], fresh)[-1]
            torch.testing.assert_close(batch.h[place], h, rtol=0, atol=1e-10)
            for ours, theirs in zip(batch.cache.keys + batch.cache.values, fresh.keys + fresh.values, strict=True):
                torch.testing.assert_close(ours[place, :, : len(ids)], theirs[0], rtol=0, atol=1e-10)
                ours[place, :, len(ids) :] = HUGE
        for stored in batch.cache.keys + batch.cache.values:
            stored[len(batch.rows) :] = HUGE

    request = Request(NEW_TOKENS, draft_length, Sampling(temperature), stops)
    batch = DecodingEngine(llama, decoder.drafter, prompts, request, policy, range(len(prompts)), check)
    pieces = batch.run()
    with torch.inference_mode():
        next(pieces)  # the prefill's
        check(None)
        for _ in pieces:
            pass
    assert 0 in seen
    assert len(seen) > 2
    assert len({len(result.token_ids) for result in batch.results}) > 2
    if temperature == 0:
        for result, whole in zip(batch.results, continuations(exports["random"], MIXED), strict=True):
            end = next((i + 1 for i, token in enumerate(whole) if token in stops.tokens), NEW_TOKENS)
            assert result.token_ids == whole[:end]


def test_logits_of_half_precision_are_fp32_sums_and_near_ties_are_named(exports: dict[str, Path]) -> None:
    """No exact tie comes from rounding the logits."""
    decoder = load(exports["random"], "cpu", torch.bfloat16)
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = decoder.llama.logits(h)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, h.float() @ decoder.llama.head_weight.float().t(), rtol=1e-5, atol=1e-5)
    prompts = [prompt_of(3, row) for row in range(24)]
    plain = decoder.generate(prompts, max_new_tokens=60, draft_length=0, batch_size=1, ignore_eos=True)
    assert 0 < sum(len(row.near_ties) for row in plain) < 0.3 * 60 * 24


def test_near_ties_of_a_text_are_its_own(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of tokens that stayed, whatever was drafted: here every third token is called a tie."""
    from nextlat_dist.inference.engine import engine

    decoder = planned(exports["random"], MIXED[:3], load(exports["random"], "cpu", torch.float64))
    monkeypatch.setattr(type(decoder.llama), "half_precision", property(lambda llama: True))
    monkeypatch.setattr(engine, "near_ties", lambda logits, dtype: logits.argmax(dim=-1) % 3 == 0)
    for draft_length in (0, 2, 5):
        results = decoder.generate(
            prompts_of(MIXED[:3]), max_new_tokens=NEW_TOKENS, draft_length=draft_length, ignore_eos=True
        )
        for result in results:
            assert result.near_ties == [i for i, token in enumerate(result.token_ids) if token % 3 == 0]


def test_no_ties_are_sought_in_full_precision(decoders: dict[str, Decoder]) -> None:
    (row,) = decoders["random"].generate([[1]], max_new_tokens=5, draft_length=0)
    assert row.near_ties == []
