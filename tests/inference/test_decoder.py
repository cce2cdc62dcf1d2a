"""The decoder as users meet it: defaults, requests that cannot be met, text in and out.

What it computes is in tests of engine/ and speculative/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.loading import load
from tests.kit.exports import (
    BOS,
    calibration,
    prompt_of,
    random_weights,
    tiny_config,
    write_export,
    write_kind,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind(tmp_path_factory.mktemp("export"), "half_right")


@pytest.fixture
def decoder(export: Path) -> Decoder:
    return load(export, "cpu", torch.float64)


def test_without_a_word_it_drafts_three_tokens_or_as_many_as_pay(tmp_path: Path) -> None:
    decoder = load(write_kind(tmp_path, "right"), "cpu", torch.float64)
    options = {"max_new_tokens": 20, "ignore_eos": True}
    fixed = decoder.generate([prompt_of(4)], **options)[0]  # type: ignore[arg-type]
    assert len(fixed.drafted_by_position) == 3
    decoder.calibration = calibration()
    (adaptive,) = decoder.generate([prompt_of(4)], **options)  # type: ignore[arg-type]
    assert len(adaptive.drafted_by_position) != 3
    decoder.calibration = calibration(draft=100.0)
    (never,) = decoder.generate([prompt_of(4)], **options)  # type: ignore[arg-type]
    assert never.drafted == 0
    assert fixed.token_ids == adaptive.token_ids == never.token_ids
    assert never.cycles == 19


def test_tokens_are_streamed_as_they_settle(tmp_path: Path) -> None:
    decoder = load(write_kind(tmp_path, "right"), "cpu", torch.float64)
    pieces = list(decoder.stream(prompt_of(4), max_new_tokens=13, draft_length=3, ignore_eos=True))
    assert [len(piece.token_ids) for piece in pieces] == [1, 4, 4, 4]
    assert [piece.accepted for piece in pieces] == [0, 3, 3, 3]
    first = next(decoder.stream(prompt_of(4), max_new_tokens=13, draft_length=3, ignore_eos=True))
    assert first == pieces[0]


def test_no_prompts_no_continuations(decoder: Decoder) -> None:
    assert decoder.generate([], max_new_tokens=3) == []


def test_fp32_agrees_with_float64(export: Path, decoder: Decoder) -> None:
    """The layouts that fp32 runs on a CPU; the seeds have no near tie."""
    single = load(export, "cpu")
    assert single.llama.embedding.dtype == torch.float32
    prompts = [prompt_of(length) for length in (3, 20, 7)]
    options = {"max_new_tokens": 30, "ignore_eos": True, "draft_length": 4}
    ours, theirs = (one.generate(prompts, **options) for one in (single, decoder))  # type: ignore[arg-type]
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_length": -1}, "change draft_length"),
        ({"draft_length": "often"}, 'a number ≥ 0 .* or "adaptive"'),
        ({"draft_length": "adaptive"}, "is not calibrated; run `nextlat calibrate`"),
        ({"batch_size": 0}, "change batch_size"),
        ({"stop_strings": "end"}, "stop_strings is 'end'"),
        ({"stop_strings": [""]}, "must be a list of texts"),
        ({"max_new_tokens": 0}, "change max_new_tokens"),
        ({"temperature": -1.0}, "change temperature"),
        ({"top_k": -1}, "change top_k"),
        ({"top_p": 0.0}, "change top_p"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, but must be a whole number"),
        ({"temperature": "0.5"}, "temperature is '0.5', but must be a number"),
        ({"temperature": None}, "temperature is None, but must be a number"),
        ({"temperature": 10**400}, "change temperature"),
        ({"top_k": 2.5}, "top_k is 2.5, but must be a whole number"),
        ({"top_k": True}, "top_k is True, but must be a whole number"),
        ({"top_p": "all"}, "top_p is 'all', but must be a number"),
        ({"seed": -1}, "change seed"),
        ({"seed": 0.5}, "seed is 0.5, but must be a whole number"),
        ({"draft_length": True}, "change draft_length"),
        ({"draft_length": 2.0}, "change draft_length"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"stop_strings": None}, "stop_strings is None"),
        ({"stop_strings": [b"x"]}, "must be a list of texts"),
        ({"stop_token_ids": 2}, "stop_token_ids is 2, but must be a list of token ids"),
        ({"stop_token_ids": "ab"}, "stop_token_ids is 'ab'"),
        ({"prompts": "abc"}, "prompts is 'abc', but must be a list of prompts; for a single one give a list of one"),
        ({"prompts": b"abc"}, "must be a list of prompts"),
        ({"prompts": 7}, "must be a list of prompts"),
        ({"prompts": [1, 2]}, "prompt 0 is 1, but must be a text or a list of token ids"),
        ({"prompts": [b"abc"]}, "prompt 0 is b'abc'"),
        ({"prompts": [[1, 2.5]]}, "prompt 0 holds 2.5 at position 1"),
        ({"prompts": [[1, None]]}, "prompt 0 holds None at position 1"),
        ({"prompts": ["half \ud83d"]}, r"prompt 0 holds half a character \(a lone surrogate, U\+D83D\) at position 5"),
        ({"prompts": [[1, 31]]}, "the model knows 0 to 30"),
        ({"prompts": [[1, -1]]}, "the model knows 0 to 30"),
        ({"prompts": [[1] * 128]}, "shorten the prompt"),
    ],
)
def test_bad_requests(decoder: Decoder, options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": [[1]], "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=message):
        decoder.generate(**arguments)  # type: ignore[arg-type]


def test_numbers_of_other_kinds_are_numbers(decoder: Decoder) -> None:
    expected = decoder.generate([[1, 2, 3]], max_new_tokens=4, temperature=1.0, top_k=5, seed=3)[0].token_ids
    options: dict[str, Any] = {"max_new_tokens": np.int64(4), "temperature": np.float32(1), "seed": np.int64(3)}
    prompts: list[Any] = [np.array([1, 2, 3]), torch.tensor([1, 2, 3]), (1, 2, 3)]
    for prompt in prompts:
        assert decoder.generate([prompt], top_k=np.int32(5), **options)[0].token_ids == expected


@pytest.mark.parametrize("temperature", [1e-38, 1e-44, 1e-300, 5e-324, -0.0])
def test_a_tiny_temperature_is_greedy(export: Path, temperature: float) -> None:
    decoder = load(export, "cpu")
    options = {"max_new_tokens": 12, "draft_length": 3, "ignore_eos": True}
    prompts = [prompt_of(length) for length in (3, 9)]
    greedy = decoder.generate(prompts, **options)  # type: ignore[arg-type]
    tiny = decoder.generate(prompts, temperature=temperature, seed=1, **options)  # type: ignore[arg-type]
    assert [g.token_ids for g in tiny] == [g.token_ids for g in greedy]


def test_without_a_seed_torchs_own_generator_decides(decoder: Decoder) -> None:
    def tokens() -> list[int]:
        return decoder.generate([[1]], max_new_tokens=20, temperature=1.0, seed=None, ignore_eos=True)[0].token_ids

    torch.manual_seed(5)
    first, second = tokens(), tokens()
    torch.manual_seed(5)
    assert (tokens(), tokens()) == (first, second)
    assert first != second


def test_device_and_dtype_by_name(export: Path) -> None:
    assert load(export, "cpu", "bfloat16").llama.embedding.dtype == torch.bfloat16
    assert load(export, "cpu", "torch.float64").llama.embedding.dtype == torch.float64
    assert load(export, "cpu:0").llama.embedding.dtype == torch.float32
    for options, message in (
        ({"dtype": "float"}, "dtype is 'float', but must be one of float32, bfloat16, float16, float64"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"device": "gpu"}, "device is 'gpu', but must be cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but this machine has"),
    ):
        with pytest.raises(UserError, match=message):
            load(export, **options)  # type: ignore[arg-type]


def test_an_export_without_predictor_decodes_plainly_only(tmp_path: Path) -> None:
    config = tiny_config()
    decoder = load(write_export(tmp_path, config, random_weights(config), None), "cpu")
    assert len(decoder.generate([[1]], max_new_tokens=5, draft_length=0, ignore_eos=True)[0].token_ids) == 5
    assert decoder.generate([[1]], max_new_tokens=5)[0].drafted == 0
    for draft_length in (1, "adaptive"):
        with pytest.raises(UserError, match="has nothing to draft with; set draft_length to 0"):
            decoder.generate([[1]], max_new_tokens=5, draft_length=draft_length)


def test_a_calibration_of_another_kind_of_device_is_refused(decoder: Decoder) -> None:
    decoder.calibration = replace(calibration(), device="cuda")
    with pytest.raises(UserError, match="was calibrated on cuda, but runs on cpu"):
        decoder.generate([[1]], max_new_tokens=5, draft_length="adaptive")


def test_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an export"):
        load(tmp_path)


def test_empty_prompt_starts_from_bos(decoder: Decoder, tmp_path: Path) -> None:
    empty, bos = decoder.generate([[], [BOS]], max_new_tokens=6)
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
