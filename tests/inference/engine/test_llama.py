"""The lean forward against transformers' LlamaForCausalLM, and the cache against a fresh prefill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.inference.engine import llama as llama_module
from nextlat_dist.inference.engine.llama import KeyValueCache, Llama
from nextlat_dist.inference.loading import load
from tests.kit.exports import random_weights, reference_model, tiny_config, write_export

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
VARIANTS = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "other_rotations": {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    "other_epsilon": {"rms_norm_eps": 1e-2},
    "wide_heads": {"head_dim": 16, "hidden_size": 40, "vocab_size": 1000, "intermediate_size": 1700},
}


def build(directory: Path, dtype: torch.dtype, **changes: object) -> tuple[Llama, torch.nn.Module]:
    config = tiny_config(**changes)
    write_export(directory, config, random_weights(config, scale=0.2), None)
    return load(directory, "cpu", dtype).llama, reference_model(directory, dtype)


def append(llama: Llama, ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """The same number of tokens to every row: ids [rows, n] → h [rows, n, hidden]."""
    rows, n = ids.shape
    return llama.forward(ids.reshape(-1), [n] * rows, cache).view(rows, n, -1)


def tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_steps_and_blocks_equal_transformers(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    llama, reference = build(tmp_path, dtype, **VARIANTS[variant])
    ids = tokens(2, 40)
    output = reference(ids, output_hidden_states=True)
    cache = llama.new_cache(2, 40)
    h = torch.cat([append(llama, block, cache) for block in ids.split([23, 1, 1, 4, 1, 2, 8], dim=1)], dim=1)
    assert cache.lengths == [40, 40]
    torch.testing.assert_close(h, output.hidden_states[-1], rtol=0, atol=TOLERANCE[dtype])
    logits = llama.logits(h.flatten(0, 1)).view(2, 40, -1)
    torch.testing.assert_close(logits, output.logits, rtol=0, atol=TOLERANCE[dtype])


@torch.inference_mode()
def test_bf16_is_as_close_to_the_truth_as_transformers(tmp_path: Path) -> None:
    llama, reference = build(tmp_path, torch.bfloat16)
    ids = tokens(1, 40)
    truth = reference_model(tmp_path, torch.float64)(ids).logits[0]
    ours = llama.logits(append(llama, ids, llama.new_cache(1, 40))[0])
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().mean() < 1.5 * (reference(ids).logits[0] - truth).abs().mean()


@torch.inference_mode()
@pytest.mark.parametrize("counts", [[(3, 3, 3), (1, 1, 1)], [(3, 1, 4), (0, 2, 1), (1, 1, 1)], [(0, 0, 5)]], ids=str)
def test_rows_of_different_lengths(tmp_path: Path, counts: list[tuple[int, ...]]) -> None:
    """Rows that accepted different numbers of tokens continue as if each were alone, by as many as each needs."""
    llama, reference = build(tmp_path, torch.float64)
    ids = tokens(3, 30)
    cache = llama.new_cache(3, 40)
    append(llama, ids[:, :12], cache)
    cache.lengths = [12, 5, 9]
    for keys, values in zip(cache.keys, cache.values, strict=True):
        for row, length in enumerate(cache.lengths):
            keys[row, :, length:] = 1e30
            values[row, :, length:] = -1e30
    for widths in counts:
        before = cache.lengths
        ends = [length + n for length, n in zip(before, widths, strict=True)]
        flat = torch.cat([ids[row, before[row] : end] for row, end in enumerate(ends)])
        parts = llama.forward(flat, widths, cache).split(widths)
        assert cache.lengths == ends
        for row, (length, h) in enumerate(zip(cache.lengths, parts, strict=True)):
            expected = reference(ids[row : row + 1, :length]).logits[0, before[row] :]
            torch.testing.assert_close(llama.logits(h), expected, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_the_last_row_takes_the_place_of_one_that_ended(tmp_path: Path) -> None:
    llama, reference = build(tmp_path, torch.float64)
    ids = tokens(3, 20)
    cache = llama.new_cache(3, 40)
    llama.forward(torch.cat([ids[0, :9], ids[1, :5], ids[2, :7]]), [9, 5, 7], cache)
    cache.move(2, 0)
    cache.shrink(2)
    assert cache.lengths == [7, 5]
    h = llama.forward(torch.cat([ids[2, 7:9], ids[1, 5:6]]), [2, 1], cache)
    for row, length, state in ((2, 9, h[1]), (1, 6, h[2])):
        expected = reference(ids[row : row + 1, :length]).logits[0, -1]
        torch.testing.assert_close(llama.logits(state[None])[0], expected, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_prefill_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, _ = build(tmp_path, torch.float64)
    prompts = [row[:n].tolist() for row, n in zip(tokens(3, 30), (30, 4, 17), strict=True)]
    monkeypatch.setattr(llama_module, "PREFILL_CHUNK_TOKENS", 21)  # 7 a row
    cache = llama.new_cache(3, 30)
    states: list[list[torch.Tensor]] = [[], [], []]
    for h, counts in llama.prefill(prompts, cache):
        for row, part in enumerate(h.split(counts)):
            states[row].append(part)
    assert cache.lengths == [30, 4, 17]
    for row, prompt in enumerate(prompts):
        whole = append(llama, torch.tensor([prompt]), llama.new_cache(1, 30))[0]
        torch.testing.assert_close(torch.cat(states[row]), whole, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_rejected_slots_do_not_count(tmp_path: Path) -> None:
    llama, _ = build(tmp_path, torch.float64)
    ids = tokens(1, 30)
    fresh = append(llama, ids, llama.new_cache(1, 30))
    cache = llama.new_cache(1, 30)
    append(llama, ids[:, :20], cache)
    cache.lengths = [11]
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, 11:] = 1e300
    h = torch.cat([append(llama, block, cache) for block in ids[:, 11:].split([1, 5, 13], dim=1)], dim=1)
    torch.testing.assert_close(h, fresh[:, 11:], rtol=0, atol=1e-12)


def test_config_with_the_older_rope_fields(tmp_path: Path) -> None:
    config = tiny_config(rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    write_export(tmp_path, config, random_weights(config), None)
    raw = json.loads((tmp_path / "config.json").read_text())
    new = LlamaConfig.from_directory(tmp_path)
    del raw["rope_parameters"]
    raw["rope_theta"] = 5000.0
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert LlamaConfig.from_directory(tmp_path) == new
    assert new.rope_theta == 5000.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "llama3"}),
    ],
)
def test_a_model_that_is_no_plain_llama_is_refused(tmp_path: Path, field: str, value: object) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), None)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw[field] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="config.json has " + field.replace("rope_parameters", "rope_type")):
        LlamaConfig.from_directory(tmp_path)
