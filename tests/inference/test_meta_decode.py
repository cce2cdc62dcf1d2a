"""Decoding on an accelerator, without one: what a prompt, a plain step, a draft and an uneven verification ask for.

The 1.3B shape in bf16 on meta tensors; fails on an operation that makes the host wait or mixes devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.huggingface.drafters.latent_predictor import LatentPredictorConfig
from nextlat_dist.inference.drafters.latent_predictor import LatentPredictorDrafter
from nextlat_dist.inference.drafting import Chooser
from nextlat_dist.inference.engine.llama import KeyValueCache, Llama
from nextlat_dist.inference.sampling import Sampling
from tests.kit.meta_step import Watch

HIDDEN, FFN, VOCAB, LAYERS, WIDTH = 2048, 5504, 50304, 2, 2048
META = torch.device("meta")


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def llama() -> Llama:
    weights = {"model.embed_tokens.weight": empty(VOCAB, HIDDEN), "model.norm.weight": empty(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = empty(HIDDEN)
        for part, size in (("q", HIDDEN), ("k", HIDDEN // 4), ("v", HIDDEN // 4), ("o", HIDDEN)):
            weights[f"{prefix}self_attn.{part}_proj.weight"] = empty(size, HIDDEN)
        for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
            weights[f"{prefix}mlp.{name}_proj.weight"] = empty(*shape)
    weights["lm_head.weight"] = empty(VOCAB, HIDDEN)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return Llama(config, weights, "meta", torch.bfloat16)


def drafter(base: Llama, reduced: bool) -> LatentPredictorDrafter:
    weights = {
        "layer_norm.weight": empty(2 * HIDDEN),
        "layer_norm.bias": empty(2 * HIDDEN),
        "linear_in.weight": empty(WIDTH, 2 * HIDDEN),
        "linear_mid.weight": empty(WIDTH, WIDTH),
        "linear_out.weight": empty(HIDDEN, WIDTH),
    }
    config = LatentPredictorConfig(HIDDEN, WIDTH, VOCAB, 8, 1e-5, "")
    vocabulary = torch.empty(8192, dtype=torch.int64, device=META) if reduced else None
    return LatentPredictorDrafter(config, weights, base, vocabulary)


def cache_of(base: Llama, lengths: list[int]) -> KeyValueCache:
    cache = base.new_cache(len(lengths), 512)
    cache.lengths = list(lengths)
    return cache


def tokens(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device=META)


SAMPLED = Sampling(temperature=0.8, top_p=0.9)


def prefill(base: Llama) -> None:
    for states, _ in base.prefill([[1] * 100, [1] * 37], cache_of(base, [0, 0])):
        base.logits(states)


def plain_step(base: Llama) -> None:
    base.logits(base.forward(tokens(4), [1] * 4, cache_of(base, [100] * 4)))


def verify_evenly(base: Llama) -> None:
    base.logits(base.forward(tokens(16), [4] * 4, cache_of(base, [100] * 4))).argmax(dim=-1)


def verify_unevenly(base: Llama) -> None:
    logits = base.logits(base.forward(tokens(8), [4, 1, 3], cache_of(base, [100, 7, 33])))
    SAMPLED.probabilities(logits)


def draft(sampling: Sampling, reduced: bool) -> Callable[[Llama], None]:
    def run(base: Llama) -> None:
        predictor = drafter(base, reduced)
        memory = predictor.start(4, 512)
        uniforms = torch.empty(4, 5, dtype=torch.float64, device=META)
        memory.roll(Chooser(sampling, predictor.vocabulary), empty(4, HIDDEN), tokens(4), uniforms, True)

    return run


def reads_a_number(base: Llama) -> None:
    plain_step(base)
    base.rotations.sum().item()


CASES: dict[str, Callable[[Llama], None]] = {
    "prefill": prefill,
    "plain-step": plain_step,
    "verify-even": verify_evenly,
    "verify-uneven": verify_unevenly,
    "draft-greedy": draft(Sampling(), False),
    "draft-sampled": draft(SAMPLED, False),
    "draft-reduced": draft(SAMPLED, True),
}


def findings(run: Callable[[Llama], None]) -> dict[str, Any]:
    base, watch = llama(), Watch(-1, set(), set())
    with torch.inference_mode(), watch:
        run(base)
    return watch.findings()


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_and_nothing_is_mixed(case: str) -> None:
    found = findings(CASES[case])
    assert (found["host_reads"], found["mixed"]) == ([], [])


def test_a_number_that_is_read_is_found() -> None:
    with pytest.raises(RuntimeError, match="meta tensors"):
        findings(reads_a_number)


def test_a_tensor_of_the_host_is_found() -> None:
    def mixed(base: Llama) -> None:
        with contextlib.suppress(RuntimeError):
            base.head_weight.index_select(0, torch.arange(3, device="cpu"))

    assert findings(mixed)["mixed"]
