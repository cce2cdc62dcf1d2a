"""Decoding as a whole: greedy output, cache and counts for right, wrong and planned drafts, and where it stops."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.inference.decoder import Decoder, Generation, Request, Row, load
from nextlat_dist.inference.drafter import Draft
from nextlat_dist.inference.sampling import Sampling
from tests.inference.exports import (
    BOS,
    EOS,
    copying_model,
    random_predictor,
    random_weights,
    reference_model,
    tiny_config,
    write_export,
    write_tokenizer,
)

NEW_TOKENS = 24
PREDICTORS = ("random", "wrong", "right", "half_right")


def write(directory: Path, kind: str) -> Path:
    """An export whose predictor is `kind`; the base is random, or (for a right one) a copying model."""
    config = tiny_config()
    if kind in ("random", "wrong"):
        weights, predictor = random_weights(config), random_predictor(config.hidden_size)
        if kind == "wrong":
            predictor = {name: -100 * tensor for name, tensor in predictor.items()}
    else:
        weights, predictor = copying_model(config)
        if kind == "half_right":
            noise = torch.randn(predictor["linear_out.weight"].shape, generator=torch.Generator().manual_seed(4))
            predictor["linear_out.weight"] += 0.25 * noise
    return write_export(directory, config, weights, predictor)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in PREDICTORS}


@pytest.fixture(scope="module")
def decoders(exports: dict[str, Path]) -> dict[str, Decoder]:
    return {kind: load(path, "cpu", torch.float64) for kind, path in exports.items()}


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return [BOS, *torch.randint(3, 31, (length - 1,), generator=generator).tolist()]


@torch.inference_mode()
def token_by_token(export: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding with transformers' model and no cache at all."""
    model, ids = reference_model(export, torch.float64), list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class PlannedDrafter:
    """Drafts the true continuation, with an error at a pseudo-random place: every number of accepted tokens occurs."""

    def __init__(self, truth: list[int], vocabulary: int) -> None:
        self.truth, self.vocabulary = truth, vocabulary
        self.emitted = 0
        self.numbers = random.Random(0)

    def on_tokens(self, row: int, tokens: list[int]) -> None:
        self.emitted += len(tokens)

    def draft(self, h: torch.Tensor, token: int, sampling: Sampling, uniforms: Sequence[float]) -> Draft:
        tokens = (self.truth + [0] * len(uniforms))[self.emitted : self.emitted + len(uniforms)]
        place = self.numbers.randrange(len(uniforms) + 1)
        return Draft([(t + 1) % self.vocabulary if i == place else t for i, t in enumerate(tokens)], None)


@pytest.mark.parametrize("prompt_length", [1, 2, 63])
@pytest.mark.parametrize("kind", PREDICTORS)
def test_greedy_output_is_token_by_token_decoding(
    exports: dict[str, Path], decoders: dict[str, Decoder], kind: str, prompt_length: int
) -> None:
    prompt = prompt_of(prompt_length)
    expected = token_by_token(exports[kind], prompt, NEW_TOKENS)
    for draft_length in (0, 1, 2, 5, 10):
        result = decoders[kind].generate(
            [prompt], max_new_tokens=NEW_TOKENS, draft_length=draft_length, ignore_eos=True
        )[0]
        assert result.token_ids == expected
        assert result.finish_reason == "length"
        assert result.cycles + result.accepted == NEW_TOKENS - 1
        assert len(result.accepted_by_position) == len(result.drafted_by_position) == draft_length
        if kind == "right":
            assert result.accepted == result.drafted
        if kind == "wrong":
            assert result.accepted < 0.3 * max(result.drafted, 1)


@pytest.mark.parametrize("draft_length", [1, 2, 5, 10])
def test_partly_right_drafts_on_a_model_with_attention(
    exports: dict[str, Path], decoders: dict[str, Decoder], draft_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, prompt = decoders["random"], prompt_of(5)
    expected = token_by_token(exports["random"], prompt, 60)
    planned = PlannedDrafter(expected, 31)
    monkeypatch.setattr(decoder, "predictor", planned)
    result = decoder.generate(
        [prompt], max_new_tokens=60, draft_length=draft_length, ignore_eos=True, on_tokens=planned.on_tokens
    )[0]
    assert result.token_ids == expected
    assert 0 < result.accepted < result.drafted
    assert result.accepted_by_position == sorted(result.accepted_by_position, reverse=True)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "temperature"), [("random", 0.0), ("half_right", 1.5)])
def test_after_every_cycle_cache_and_state_equal_a_fresh_prefill(
    decoders: dict[str, Decoder], kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that were taken back are filled with huge values, so that reading one would show."""
    decoder, prompt = decoders[kind], prompt_of(7)
    expected = decoder.generate([prompt], max_new_tokens=40, draft_length=0, ignore_eos=True)[0].token_ids
    planned = PlannedDrafter(expected, 31)
    if temperature == 0:
        monkeypatch.setattr(decoder, "predictor", planned)
    row = Row(decoder, prompt, Request(40, 4, Sampling(temperature), frozenset()), random.Random(3))
    row.prefill()
    accepted = set()
    while len(row.result.token_ids) < 40:
        planned.emitted = len(row.result.token_ids)
        accepted.add(len(row.cycle()) - 1)
        ids = [*prompt, *row.result.token_ids[:-1]]
        assert row.cache.lengths == [len(ids)]
        fresh = decoder.llama.new_cache(1, len(ids))
        h = decoder.llama.prefill(torch.tensor([ids]), fresh)
        torch.testing.assert_close(row.h, h, rtol=0, atol=1e-10)
        for ours, theirs in zip(row.cache.keys + row.cache.values, fresh.keys + fresh.values, strict=True):
            torch.testing.assert_close(ours[:, :, : len(ids)], theirs, rtol=0, atol=1e-10)
            ours[:, :, len(ids) :] = 1e300
    assert accepted >= {0, 1, 2}
    if temperature == 0:
        assert row.result.token_ids == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_length", [0, 3, 5])
def test_stop_token_and_limit_at_every_offset_of_a_block(
    decoders: dict[str, Decoder], draft_length: int, temperature: float
) -> None:
    """With a predictor that is right, blocks are full; a stop token may then stand anywhere in one."""
    decoder, prompt = decoders["right"], prompt_of(6)
    options = {"draft_length": draft_length, "temperature": temperature, "ignore_eos": True, "seed": 1}

    def generate(limit: int, stops: Sequence[int] = ()) -> Generation:
        return decoder.generate([prompt], max_new_tokens=limit, stop_token_ids=stops, **options)[0]  # type: ignore[arg-type]

    whole = generate(16).token_ids
    for limit in range(1, 16):
        result = generate(limit)
        assert len(result.token_ids) == limit
        if temperature == 0:
            assert result.token_ids == whole[:limit]
        assert result.finish_reason == "length"
    for token in set(whole):
        first = whole.index(token)
        result = generate(16, [token])
        assert result.token_ids == whole[: first + 1]
        assert result.finish_reason == "stop"
        assert result.cycles <= first
        assert result.accepted <= max(first, 0)
        assert result.cycles + result.accepted in (first, first + 1)  # the stop token may be a draft or the free token


def test_eos_of_the_export_stops_unless_ignored(decoders: dict[str, Decoder]) -> None:
    decoder = decoders["random"]
    prompts = [prompt_of(length) for length in range(2, 30)]
    free = decoder.generate(prompts, max_new_tokens=30, ignore_eos=True)
    stopped = decoder.generate(prompts, max_new_tokens=30)
    assert any(EOS in generation.token_ids for generation in free)
    for one, other in zip(free, stopped, strict=True):
        cut = one.token_ids.index(EOS) + 1 if EOS in one.token_ids else 30
        assert other.token_ids == one.token_ids[:cut]
        assert other.finish_reason == ("stop" if EOS in one.token_ids else "length")


@pytest.mark.parametrize("draft_length", [0, 1, 4, 10])
def test_the_context_limit_ends_a_continuation(decoders: dict[str, Decoder], draft_length: int) -> None:
    decoder = decoders["right"]
    for room in (1, 2, 3, 6):
        result = decoder.generate(
            [prompt_of(128 - room)], max_new_tokens=50, draft_length=draft_length, ignore_eos=True
        )[0]
        assert len(result.token_ids) == room
        assert result.finish_reason == "length"


def test_rows_do_not_depend_on_their_neighbours(decoders: dict[str, Decoder]) -> None:
    decoder, prompts = decoders["half_right"], [prompt_of(length) for length in (4, 9, 4)]
    together = decoder.generate(prompts, max_new_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        alone = decoder.generate([prompt], max_new_tokens=20, temperature=1.0, seed=11 + index, ignore_eos=True)[0]
        assert alone.token_ids == together[index].token_ids
    assert together[0].token_ids != together[2].token_ids  # the same prompt twice is two samples


def test_tokens_are_streamed_as_they_settle(decoders: dict[str, Decoder]) -> None:
    events: list[tuple[int, list[int]]] = []
    results = decoders["right"].generate(
        [prompt_of(4), prompt_of(5)],
        max_new_tokens=13,
        ignore_eos=True,
        on_tokens=lambda row, tokens: events.append((row, tokens)),
    )
    for row, result in enumerate(results):
        own = [tokens for index, tokens in events if index == row]
        assert [token for tokens in own for token in tokens] == result.token_ids
        assert [len(tokens) for tokens in own] == [1, 4, 4, 4]


def test_fp32_agrees_with_float64(exports: dict[str, Path], decoders: dict[str, Decoder]) -> None:
    """The layouts that fp32 runs on a CPU; the seeds have no near tie."""
    single = load(exports["half_right"], "cpu")
    assert single.llama.embedding.dtype == torch.float32
    for length in (3, 20):
        options = {"max_new_tokens": 30, "ignore_eos": True, "draft_length": 4}
        ours = single.generate([prompt_of(length)], **options)[0]  # type: ignore[arg-type]
        assert ours.token_ids == decoders["half_right"].generate([prompt_of(length)], **options)[0].token_ids  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_length": -1}, "change draft_length"),
        ({"max_new_tokens": 0}, "change max_new_tokens"),
        ({"temperature": -1.0}, "change temperature"),
        ({"top_k": -1}, "change top_k"),
        ({"top_p": 0.0}, "change top_p"),
        ({"prompts": [[1, 31]]}, "the model knows 0 to 30"),
        ({"prompts": [[1, -1]]}, "the model knows 0 to 30"),
        ({"prompts": [[1] * 128]}, "shorten the prompt"),
    ],
)
def test_bad_requests(decoders: dict[str, Decoder], options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": [[1]], "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=message):
        decoders["random"].generate(**arguments)  # type: ignore[arg-type]


def test_an_export_without_predictor_decodes_plainly_only(tmp_path: Path) -> None:
    config = tiny_config()
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu")
    assert len(decoder.generate([[1]], max_new_tokens=5, draft_length=0, ignore_eos=True)[0].token_ids) == 5
    with pytest.raises(UserError, match="has no latent predictor; set draft_length to 0"):
        decoder.generate([[1]], max_new_tokens=5)


def test_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an export"):
        load(tmp_path)


def test_empty_prompt_starts_from_bos(decoders: dict[str, Decoder], tmp_path: Path) -> None:
    empty, bos = decoders["random"].generate([[], [BOS]], max_new_tokens=6)
    assert empty.token_ids == bos.token_ids
    config = tiny_config(bos_token_id=None)
    without = load(write_export(tmp_path, config, random_weights(config), None), "cpu")
    with pytest.raises(UserError, match="no BOS token"):
        without.generate([[]], max_new_tokens=6, draft_length=0)


def test_text_in_and_out(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    config = tiny_config(vocab_size=size)
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu", torch.float64)
    for text in ("alpha beta", "return self ", "größe beta"):
        ids = decoder.encode(text)
        assert ids[0] == BOS
        assert decoder.tokenizer.decode(ids, skip_special_tokens=True) == text
        from_text, from_ids = (
            decoder.generate([prompt], max_new_tokens=9, draft_length=0, ignore_eos=True)[0] for prompt in (text, ids)
        )
        assert from_text.token_ids == from_ids.token_ids
        assert from_ids.text is None
        assert from_text.text is not None
        whole = decoder.tokenizer.decode([*ids, *from_text.token_ids], skip_special_tokens=True)
        assert text + from_text.text == whole


def test_continuation_text(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=write_tokenizer(tmp_path))
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu")
    prompt, whole = decoder.encode("alpha"), decoder.encode("alpha gamma ✓")
    assert decoder.continuation_text(prompt, whole[len(prompt) :]) == " gamma ✓"
    assert decoder.continuation_text(whole[:-1], whole[-1:]) == "\N{REPLACEMENT CHARACTER}"  # one byte of a character
