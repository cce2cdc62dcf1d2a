"""`model.generate(custom_generate=nextlat_generate)`: stock transformers' own result, or one sentence why not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
)

from nextlat_dist.errors import UserError
from nextlat_dist.inference import Piece
from nextlat_dist.integrations import transformers_generate
from nextlat_dist.integrations.transformers_generate import nextlat_generate
from tests.kit.exports import (
    copying_model,
    random_predictor,
    random_weights,
    reference_model,
    tiny_config,
    write_export,
    write_tokenizer,
)
from tests.kit.form_exports import bst_export, jtp_export

EOS, PAD = [2, 5], 3
PROMPTS = [[1, 9, 10, 11, 12], [1, 20], [1, 8, 30, 7, 7, 19, 4]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy continuations of `PROMPTS` meet an EOS after different numbers of tokens, or none."""
    config = tiny_config(eos_token_id=EOS, pad_token_id=PAD)
    return write_export(tmp_path_factory.mktemp("export"), config, random_weights(config, 17), random_predictor(32))


@pytest.fixture(scope="module")
def model(export: Path) -> LlamaForCausalLM:
    return reference_model(export, torch.float64)


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def both(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """stock `generate`'s result, and ours for the same options."""
    own = {name: options.pop(name) for name in ("draft_length", "seed") if name in options}
    return model.generate(**batch, **options), model.generate(
        **batch, **options, custom_generate=nextlat_generate, **own
    )


@pytest.mark.parametrize("draft_length", [0, 1, 4, None])
@pytest.mark.parametrize("limit", [1, 2, 7, 40])
def test_greedy_is_equal_to_stock_generate(model: LlamaForCausalLM, limit: int, draft_length: int | None) -> None:
    stock, ours = both(model, left_padded(PROMPTS), max_new_tokens=limit, draft_length=draft_length)
    assert ours.dtype == stock.dtype
    assert torch.equal(ours, stock)


def test_the_rows_of_these_tests_end_differently(model: LlamaForCausalLM) -> None:
    batch = left_padded(PROMPTS)
    new = model.generate(**batch, max_new_tokens=40)[:, batch["input_ids"].shape[1] :].tolist()
    lengths = [next((i for i, token in enumerate(row) if token in EOS), 40) for row in new]
    assert len(set(lengths)) == 3, lengths
    assert any(row[i] == EOS[1] for i, row in zip(lengths, new, strict=True) if i < 40), "the second EOS is met"


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 20},
        {"max_new_tokens": 20, "eos_token_id": 2},
        {"max_new_tokens": 20, "eos_token_id": [17]},
        {"max_new_tokens": 20, "pad_token_id": 0},
        {"max_new_tokens": 6, "num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {},
    ],
    ids=["max_length", "one-eos", "other-eos", "pad", "return-sequences", "default-length"],
)
def test_options_mean_what_they_mean_to_transformers(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    stock, ours = both(model, left_padded(PROMPTS), **options, draft_length=3)
    assert torch.equal(ours, stock)


def test_one_row_without_a_mask(model: LlamaForCausalLM) -> None:
    stock, ours = both(model, {"input_ids": torch.tensor(PROMPTS[:1])}, max_new_tokens=12, draft_length=2)
    assert torch.equal(ours, stock)


def test_a_dict_is_returned_when_asked_for(model: LlamaForCausalLM) -> None:
    stock, ours = both(model, left_padded(PROMPTS), max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert torch.equal(ours.sequences, stock.sequences)


def test_a_row_ends_at_the_context(model: LlamaForCausalLM) -> None:
    prompt = torch.tensor([[1] + [9, 10, 11] * 40])
    ours = model.generate(prompt, max_new_tokens=20, eos_token_id=None, custom_generate=nextlat_generate)
    assert ours.shape[1] == 128


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"temperature": 1.3, "top_p": 0.7}])
def test_sampling_warps_as_transformers_does(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    """2000 draws of the first token and of the second: nearly the same shares."""
    batch = {"input_ids": torch.tensor([[1, 9, 10, 11]]).repeat(2000, 1)}
    torch.manual_seed(0)
    stock, ours = both(model, batch, do_sample=True, max_new_tokens=2, eos_token_id=None, draft_length=1, **options)
    for position in (4, 5):
        p, q = (torch.bincount(rows[:, position], minlength=31) / 2000 for rows in (stock, ours))
        assert float((p - q).abs().sum()) / 2 < 0.06


def test_seeds(model: LlamaForCausalLM) -> None:
    def sample(**options: Any) -> list[list[int]]:
        rows = model.generate(
            **left_padded(PROMPTS), do_sample=True, max_new_tokens=8, custom_generate=nextlat_generate, **options
        )
        ids: list[list[int]] = rows.tolist()
        return ids

    torch.manual_seed(4)
    first, second = sample(), sample()
    torch.manual_seed(4)
    assert first == sample()
    assert first != second
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)


def test_pieces_are_the_new_tokens(model: LlamaForCausalLM) -> None:
    pieces: list[Piece] = []
    batch = left_padded(PROMPTS)
    ours = model.generate(**batch, max_new_tokens=9, custom_generate=nextlat_generate, on_piece=pieces.append)
    for row in range(3):
        new = [token for piece in pieces if piece.row == row for token in piece.token_ids]
        width = batch["input_ids"].shape[1]
        assert ours[row, width:].tolist() == new + EOS[:1] * (ours.shape[1] - width - len(new))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Any, dict[str, torch.Tensor]]:
    """A model that says whole words, its tokenizer and a batch of prompts."""
    directory = tmp_path_factory.mktemp("words")
    config = tiny_config(vocab_size=write_tokenizer(directory))
    weights, predictor = copying_model(config)
    weights["lm_head.weight"][:259] = 0  # no special tokens, no bytes
    model = reference_model(write_export(directory, config, weights, predictor), torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["return self", "import", "alpha beta gamma"]
    return model, tokenizer, tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")


@pytest.mark.parametrize("by_criterion", [False, True])
def test_stop_strings(words: tuple[LlamaForCausalLM, Any, dict[str, torch.Tensor]], by_criterion: bool) -> None:
    model, tokenizer, batch = words
    plain = model.generate(**batch, max_new_tokens=12)
    stop = tokenizer.decode(plain[1, -8:-5])[1:]  # begins inside a token
    wanted = model.generate(**batch, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)
    assert not torch.equal(plain, wanted)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    options = {"stopping_criteria": criteria} if by_criterion else {"stop_strings": stop}
    ours = model.generate(**batch, max_new_tokens=12, custom_generate=nextlat_generate, draft_length=5, **options)
    assert torch.equal(ours, wanted)
    with pytest.raises(UserError, match="set pad_token_id"):
        model.generate(
            **batch, max_new_tokens=12, eos_token_id=None, custom_generate=nextlat_generate, draft_length=5, **options
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 2}, "these options ask for beam search; leave out num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "ask for assisted generation"),
        ({"repetition_penalty": 1.2}, "has a RepetitionPenaltyLogitsProcessor"),
        ({"do_sample": True, "min_p": 0.1}, "has a MinPLogitsWarper"),
        ({"min_new_tokens": 3}, "has a MinLengthLogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, "has a TemperatureLogitsWarper"),
        (
            {
                "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
                "do_sample": True,
                "temperature": 0.5,
            },
            "has a TemperatureLogitsWarper",
        ),
        ({"max_time": 3.0}, "has a MaxTimeCriteria"),
        (
            {"return_dict_in_generate": True, "output_scores": True},
            "cannot honour output_scores; leave output_scores out",
        ),
        ({"draft_length": -1}, "draft_length is -1"),
        ({"export": "/nowhere"}, "'/nowhere', which is no export on this machine"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused(model: LlamaForCausalLM, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        model.generate(**left_padded(PROMPTS), **{"max_new_tokens": 4, **options}, custom_generate=nextlat_generate)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_not_supported_are_refused(model: LlamaForCausalLM) -> None:
    def generate(**options: Any) -> None:
        model.generate(max_new_tokens=4, custom_generate=nextlat_generate, **options)

    ids = torch.tensor([[1, 9, 10], [1, 9, PAD]])
    with pytest.raises(UserError, match="row 1 of input_ids ends in a token that attention_mask hides"):
        generate(input_ids=ids, attention_mask=(ids != PAD).long())
    with pytest.raises(UserError, match="leave position_ids out"):
        generate(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.tensor([[5, 6, 7]]))
    cache = model(input_ids=ids[:1, :2], use_cache=True).past_key_values
    with pytest.raises(UserError, match="cannot honour past_key_values"):
        generate(input_ids=ids[:1], past_key_values=cache)


def test_only_an_unchanged_export_with_a_predictor(export: Path, tmp_path: Path) -> None:
    batch = left_padded(PROMPTS)
    config = tiny_config(eos_token_id=EOS, pad_token_id=PAD)
    bare = LlamaForCausalLM.from_pretrained(write_export(tmp_path / "bare", config, random_weights(config), None))
    with pytest.raises(UserError, match="has no latent predictor to draft with"):
        bare.generate(**batch, max_new_tokens=4, custom_generate=nextlat_generate)
    stock, ours = both(bare, batch, max_new_tokens=4, draft_length=0)
    assert torch.equal(stock, ours)

    model = LlamaForCausalLM.from_pretrained(export)
    model.generate(**batch, max_new_tokens=4, custom_generate=nextlat_generate)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3  # after the decoder was built
    with pytest.raises(UserError, match=r"the model's model\.layers\.1\.mlp\.up_proj\.weight is not that of"):
        model.generate(**batch, max_new_tokens=4, custom_generate=nextlat_generate)

    changed = LlamaForCausalLM.from_pretrained(export, rms_norm_eps=1e-3)
    with pytest.raises(UserError, match=r"rms_norm_eps 0\.001, but the export in .* has 1e-06"):
        changed.generate(**batch, max_new_tokens=4, custom_generate=nextlat_generate)


def test_a_predictor_of_other_base_weights_is_refused(export: Path, tmp_path: Path) -> None:
    config = tiny_config(eos_token_id=EOS, pad_token_id=PAD)
    other = write_export(tmp_path, config, random_weights(config, 9), None)
    (other / "latent_predictor").symlink_to(export / "latent_predictor")
    model = LlamaForCausalLM.from_pretrained(other)
    with pytest.raises(UserError, match=r"belongs to base weights \w+…, but .* holds"):
        model.generate(**left_padded(PROMPTS), max_new_tokens=4, custom_generate=nextlat_generate)


def test_a_cast_model_decodes_in_its_own_dtype(export: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(export, dtype=torch.bfloat16)
    pieces: list[Piece] = []
    model.generate(**left_padded(PROMPTS), max_new_tokens=9, custom_generate=nextlat_generate, on_piece=pieces.append)
    assert pieces
    assert transformers_generate._decoders[model][1].llama.embedding.dtype == torch.bfloat16


def test_one_decoder_per_model_and_none_left_behind(export: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(export)
    batch = left_padded(PROMPTS)
    model.generate(**batch, max_new_tokens=2, custom_generate=nextlat_generate)
    decoder = weakref.ref(transformers_generate._decoders[model][1])
    model.generate(**batch, max_new_tokens=2, custom_generate=nextlat_generate)
    assert transformers_generate._decoders[model][1] is decoder()
    del model
    gc.collect()
    assert decoder() is None


@pytest.mark.parametrize(("make", "draft_length"), [(jtp_export, 2), (bst_export, 0)])
def test_bases_that_are_more_than_a_llama(make: Callable[..., Path], draft_length: int, tmp_path: Path) -> None:
    model = reference_model(make(tmp_path, eos_token_id=EOS[0], pad_token_id=PAD), torch.float64)
    expected, found = both(model, left_padded(PROMPTS), max_new_tokens=12, draft_length=draft_length)
    assert torch.equal(expected, found)
