"""Ends of continuations: stop tokens, stop strings and limits, at every offset inside a block; nothing after them.

Command: `pytest tests/inference/engine/test_ends.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import DraftLength
from nextlat_dist.inference.loading import load
from tests.kit.exports import (
    BOS,
    EOS,
    calibration,
    copying_model,
    prompt_of,
    tiny_config,
    write_export,
    write_kind,
    write_tokenizer,
)

SEED = 4
DRAFT_LENGTHS: tuple[DraftLength, ...] = (0, 3, 5, "adaptive")


def load_calibrated(export: Path) -> Decoder:
    decoder = load(export, "cpu", torch.float64)
    decoder.calibration = calibration()
    return decoder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """With a predictor that is right, blocks are full, and an end may stand anywhere in one."""
    return {
        kind: load_calibrated(write_kind(tmp_path_factory.mktemp(kind), kind))
        for kind in ("right", "half_right", "random")
    }


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """One with a tokenizer, whose drafts are right."""
    directory = tmp_path_factory.mktemp("speaking")
    config = tiny_config(vocab_size=write_tokenizer(directory))
    weights, predictor = copying_model(config, seed=SEED)
    weights["lm_head.weight"][: 3 + 256] = 0.0  # text of whole characters
    return load_calibrated(write_export(directory, config, weights, predictor))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_length", DRAFT_LENGTHS)
@pytest.mark.parametrize("kind", ["right", "half_right"])
def test_stop_token_at_every_offset_of_a_block(
    decoders: dict[str, Decoder], kind: str, draft_length: DraftLength, temperature: float
) -> None:
    prompts = [prompt_of(6), prompt_of(2)]
    options: dict[str, Any] = {"draft_length": draft_length, "temperature": temperature, "ignore_eos": True, "seed": 1}
    whole = [result.token_ids for result in decoders[kind].generate(prompts, max_new_tokens=16, **options)]
    for token in {token for tokens in whole for token in tokens}:
        results = decoders[kind].generate(prompts, max_new_tokens=16, stop_token_ids=[token], **options)
        for tokens, result in zip(whole, results, strict=True):
            end = tokens.index(token) + 1 if token in tokens else 16
            assert result.token_ids[: end - 1] == tokens[: end - 1] or draft_length == "adaptive"
            if temperature == 0 or draft_length != "adaptive":
                assert result.token_ids == tokens[:end]
                assert result.finish_reason == ("stop" if token in tokens else "length")
            assert token not in result.token_ids[:-1]
            assert (result.finish_reason == "stop") == (result.token_ids[-1] == token)
            # The stop token may be a draft or the free token of its cycle.
            assert result.cycles + result.accepted in (len(result.token_ids) - 1, len(result.token_ids))
            assert len(result.from_draft) == len(result.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_length", DRAFT_LENGTHS)
def test_the_limit_at_every_offset_of_a_block(
    decoders: dict[str, Decoder], draft_length: DraftLength, temperature: float
) -> None:
    prompts = [prompt_of(6), prompt_of(2)]
    options: dict[str, Any] = {"draft_length": draft_length, "temperature": temperature, "ignore_eos": True, "seed": 1}
    whole = decoders["right"].generate(prompts, max_new_tokens=16, **options)
    for limit in range(1, 16):
        for complete, result in zip(
            whole, decoders["right"].generate(prompts, max_new_tokens=limit, **options), strict=True
        ):
            assert len(result.token_ids) == limit
            assert result.finish_reason == "length"
            if temperature == 0:
                assert result.token_ids == complete.token_ids[:limit]


@pytest.mark.parametrize("draft_length", [0, 1, 4, 10, "adaptive"])
def test_the_context_limit_at_every_offset_of_a_block(decoders: dict[str, Decoder], draft_length: DraftLength) -> None:
    """Rows of one batch may have different numbers of tokens; the first is far from the limit."""
    budgets = [30, *range(1, 8)]
    prompts = [prompt_of(128 - budget) for budget in budgets]
    results = decoders["right"].generate(prompts, max_new_tokens=20, draft_length=draft_length, ignore_eos=True)
    for budget, prompt, result in zip(budgets, prompts, results, strict=True):
        assert len(result.token_ids) == min(budget, 20)
        assert result.finish_reason == "length"
        (free,) = decoders["right"].generate([prompt[-1:]], max_new_tokens=20, draft_length=0, ignore_eos=True)
        assert result.token_ids == free.token_ids[: min(budget, 20)], "this model looks at the last token alone"


@pytest.mark.parametrize("draft_length", [0, 4, "adaptive"])
def test_eos_of_the_export_stops_unless_ignored(decoders: dict[str, Decoder], draft_length: DraftLength) -> None:
    prompts = [prompt_of(length) for length in range(2, 30)]
    options: dict[str, Any] = {"max_new_tokens": 30, "draft_length": draft_length}
    free = decoders["random"].generate(prompts, ignore_eos=True, **options)
    stopped = decoders["random"].generate(prompts, **options)
    assert any(EOS in generation.token_ids for generation in free)
    for one, other in zip(free, stopped, strict=True):
        cut = one.token_ids.index(EOS) + 1 if EOS in one.token_ids else 30
        assert other.token_ids == one.token_ids[:cut]
        assert other.finish_reason == ("stop" if EOS in one.token_ids else "length")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("draft_length", [0, 3, 5])
def test_stop_string_of_several_tokens_at_every_offset_of_a_block(
    speaking: Decoder, draft_length: int, temperature: float
) -> None:
    """Against the definition: the first token after which the continuation's text has the string in it is the last."""
    prompt = "alpha beta"
    ids = speaking.encode(prompt)
    options: dict[str, Any] = {
        "max_new_tokens": 14,
        "draft_length": draft_length,
        "temperature": temperature,
        "ignore_eos": True,
        "seed": 3,
    }
    (whole,) = speaking.generate([prompt], **options)
    texts = [speaking.continuation_text(ids, whole.token_ids[:n]) for n in range(15)]
    strings = {texts[n + size][len(texts[n]) :] for n in range(14) for size in (1, 2, 3) if n + size <= 14}
    strings |= {string[1:-1] for string in strings if len(string) > 4}  # begins and ends inside tokens
    seen = set()
    for string in sorted(string for string in strings if string and "\N{REPLACEMENT CHARACTER}" not in string):
        pieces = list(speaking.stream(prompt, stop_strings=[string], **options))
        (result,) = speaking.generate([prompt], stop_strings=[string, "not there"], **options)
        end = next(n for n in range(15) if string in texts[n])
        assert result.token_ids == whole.token_ids[:end], string
        assert [token for piece in pieces for token in piece.token_ids] == result.token_ids
        assert result.finish_reason == "stop"
        assert result.text == texts[end][: texts[end].index(string)]
        seen.add(end)
    assert len(seen) > 8


def test_the_first_of_several_stop_strings_counts_and_the_prompt_does_not(speaking: Decoder) -> None:
    prompt = "alpha beta"
    options: dict[str, Any] = {"max_new_tokens": 14, "draft_length": 5, "ignore_eos": True}
    (whole,) = speaking.generate([prompt], **options)
    assert whole.text is not None
    early, late = whole.text[2:6], whole.text[8:13]
    assert whole.text.index(early) + 4 < whole.text.index(late)
    for strings in ([early, late], [late, early]):
        (result,) = speaking.generate([prompt], stop_strings=strings, **options)
        assert result.text == whole.text[: whole.text.index(early)]
    (result,) = speaking.generate([prompt], stop_strings=[prompt, "beta" + whole.text[:1]], **options)
    assert result.token_ids == whole.token_ids, "a stop string lies in the continuation as a whole"
    (by_ids,) = speaking.generate([speaking.encode(prompt)], stop_strings=[early], **options)
    assert by_ids.token_ids == speaking.generate([prompt], stop_strings=[early], **options)[0].token_ids
    assert by_ids.text is None


def test_a_stop_token_before_a_stop_string_counts(speaking: Decoder) -> None:
    options: dict[str, Any] = {"max_new_tokens": 14, "draft_length": 5, "ignore_eos": True}
    prompt = [BOS, *speaking.encode("alpha beta")[1:]]
    (whole,) = speaking.generate([prompt], **options)
    text = speaking.continuation_text(prompt, whole.token_ids)
    token = whole.token_ids[3]
    end = whole.token_ids.index(token) + 1
    (result,) = speaking.generate([prompt], stop_token_ids=[token], stop_strings=[text[-3:]], **options)
    cut = next(n for n in range(15) if text[-3:] in speaking.continuation_text(prompt, whole.token_ids[:n]))
    assert result.token_ids == whole.token_ids[: min(end, cut)]
