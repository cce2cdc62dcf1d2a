"""The decoder as users meet it: defaults, requests that cannot be met, text in and out.

What it computes is in tests of engine/ and speculative/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
        ({"prompts": [[1, 31]]}, "the model knows 0 to 30"),
        ({"prompts": [[1, -1]]}, "the model knows 0 to 30"),
        ({"prompts": [[1] * 128]}, "shorten the prompt"),
    ],
)
def test_bad_requests(decoder: Decoder, options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": [[1]], "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=message):
        decoder.generate(**arguments)  # type: ignore[arg-type]


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
