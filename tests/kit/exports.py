"""Tiny exports for the tests of inference and evaluation: random weights, or weights whose predictor is right."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nextlat_dist.huggingface.base import LlamaConfig as BaseConfig
from nextlat_dist.huggingface.base import save_base_weights
from nextlat_dist.huggingface.drafters.latent_predictor import LatentPredictorConfig, save_predictor
from nextlat_dist.huggingface.tokenizer import export_tokenizer
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.latent_predictor import LatentPredictorDrafter
from nextlat_dist.inference.drafting import Chooser, Drawn, unroll
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration, Costs

BOS, EOS = 1, 2


def tiny_config(**changes: object) -> LlamaConfig:
    fields: dict[str, object] = {
        "vocab_size": 31,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**fields, **changes})


def random_weights(config: LlamaConfig, seed: int = 0, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Weights far enough from zero that attention and logits are not nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if tensor.dim() == 1 else scale * noise
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def random_predictor(hidden: int, seed: int = 1, width: int = 24, scale: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer_norm.weight": torch.ones(2 * hidden),
        "layer_norm.bias": 0.1 * torch.randn(2 * hidden, generator=generator),
        "linear_in.weight": scale * torch.randn(width, 2 * hidden, generator=generator),
        "linear_mid.weight": scale * torch.randn(width, width, generator=generator),
        "linear_out.weight": scale * torch.randn(hidden, width, generator=generator),
    }


def copying_model(config: LlamaConfig, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base weights whose h_t is the embedding of x_t alone, and the predictor that is then right about every state.

    The layers add nothing, and the embeddings have mean 0 and mean square 1, so both norms leave them as they are. The
    predictor has to compute e(x) - h, and gelu(z) - gelu(-z) = z carries that through its two activations.
    """
    hidden = config.hidden_size
    weights = random_weights(config, seed, scale=1.0)
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
    embedding = weights["model.embed_tokens.weight"]
    embedding -= embedding.mean(dim=1, keepdim=True)
    embedding /= embedding.square().mean(dim=1, keepdim=True).sqrt()
    one = torch.eye(hidden)
    difference = torch.cat([-one, one], dim=1)  # [h, e] → e - h
    halves = torch.cat([one, -one], dim=1)
    predictor = {
        "layer_norm.weight": torch.ones(2 * hidden),
        "layer_norm.bias": torch.zeros(2 * hidden),
        "linear_in.weight": torch.cat([difference, -difference]),
        "linear_mid.weight": torch.cat([halves, -halves]),
        "linear_out.weight": halves.clone(),
    }
    return weights, predictor


def write_kind(directory: Path, kind: str) -> Path:
    """An export whose predictor is "random", "wrong", "right" or "half_right"; the base is random, or (for a right one)
    a copying model.
    """
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


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens of `tiny_config`'s vocabulary, BOS and EOS not among them."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 31, (length,), generator=generator).tolist()


class PlannedDrafter:
    """Drafts each row's true sequence, with an error at a pseudo-random place of every cycle, if any; the confidence
    that it gives varies. So every number of accepted tokens occurs, at every length of an adaptive draft.
    """

    longest: int | None = None
    vocabulary: torch.Tensor | None = None

    def __init__(self, sequences: list[list[int]], size: int) -> None:
        """`sequences` are prompts with their greedy continuations, row by row; `size` is that of the vocabulary."""
        self.sequences, self.size = sequences, size

    def start(self, rows: int, capacity: int) -> _Plan:
        return _Plan(self, rows)


class _Plan:
    """Which sequence is in which row, and how much of it is settled."""

    def __init__(self, drafter: PlannedDrafter, rows: int) -> None:
        self.drafter = drafter
        self.sequence, self.settled = list(range(rows)), [0] * rows
        self.going: list[int] = []
        self.step = 0

    def observe(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        for row, kept in enumerate(settled):
            self.settled[row] += kept

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        self.going = list(range(len(h))) if rows is None else list(rows)
        self.step = 0

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:
            self.going = [self.going[place] for place in kept.tolist()]
        logits = torch.zeros(len(self.going), self.drafter.size, dtype=torch.float64)
        for place, row in enumerate(self.going):
            sequence, position = self.drafter.sequences[self.sequence[row]], self.settled[row] + 1 + self.step
            numbers = random.Random(f"{self.sequence[row]} {self.settled[row]}")
            token = sequence[position] if position < len(sequence) else 0
            if numbers.randrange(5) == self.step:
                token = (token + 1) % self.drafter.size
            logits[place, token] = 3 + 6 * numbers.random()
        self.step += 1
        return logits

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        return unroll(self, chooser, h, tokens, uniforms, confidences)

    def move(self, source: int, target: int) -> None:
        self.sequence[target], self.settled[target] = self.sequence[source], self.settled[source]


@torch.inference_mode()
def token_by_token(export: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy decoding of prompts of one length with transformers' model and no cache at all."""
    model, ids = reference_model(export, torch.float64), torch.tensor(prompts)
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, len(prompts[0]) :].tolist()


def reference_model(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' model of an export; its norms compute in `dtype` (they would fall back to fp32 in float64)."""
    BaseConfig.from_directory(directory).form.register()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            exact = partial(
                functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
            setattr(module, "normalise" if hasattr(module, "normalise") else "forward", exact)
    return model


def write_export(
    directory: Path,
    config: LlamaConfig,
    weights: dict[str, torch.Tensor],
    predictor: dict[str, torch.Tensor] | None,
    epsilon: float = 1e-5,
) -> Path:
    """An export; `epsilon` of the predictor's norm."""
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    eos_and_bos = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (directory / "generation_config.json").write_text(json.dumps(eos_and_bos))
    digest = save_base_weights(directory, weights)
    if predictor is not None:
        width = predictor["linear_mid.weight"].shape[0]
        fields = LatentPredictorConfig(config.hidden_size, width, config.vocab_size, 2, epsilon, digest)
        save_predictor(directory, fields, predictor)
    return directory


def write_tokenizer(directory: Path) -> int:
    """Tokenizer files of a sentencepiece model with byte fallback, as an export has them; returns the size."""
    words = ["alpha", "beta", "gamma", "delta", "return", "self", "import", "value"]
    pick = random.Random(0)
    lines = [" ".join(pick.choices(words, k=8)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = directory / "tokenizer.source.model"
    path.write_bytes(model.getvalue())
    export_tokenizer(path, directory, 128)
    size: int = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return size


def word_decoder(directory: Path) -> Decoder:
    """A decoder that says whole words, and whose drafts are right."""
    config = tiny_config(vocab_size=write_tokenizer(directory))
    weights, predictor = copying_model(config)
    weights["lm_head.weight"][:259] = 0  # no special tokens, no bytes
    return load(write_export(directory, config, weights, predictor), dtype=torch.float64)


def calibration(draft: float = 0.05, per_token: float = 0.1) -> Calibration:
    """Costs and acceptance at which adaptive drafting stops at several lengths."""
    costs = Costs({1: draft}, {1: {n: 1 + per_token * (n - 1) for n in (1, 2, 4, 8, 16)}})
    shares = [0.7, 0.65, 0.6, 0.5, 0.4]
    return Calibration("cpu", costs, [Acceptance(temperature, shares, [0.2, 1.0, -0.3]) for temperature in (0.0, 1.0)])


def tiny_world(directory: Path, vocabulary: int) -> Path:
    """An export of so few tokens that its continuations can be enumerated; it keeps half of its drafts."""
    config = tiny_config(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=None,
    )
    return write_export(directory, config, random_weights(config, seed=1, scale=0.6), random_predictor(8, width=8))


def reduced(decoder: Decoder, ids: list[int]) -> LatentPredictorDrafter:
    """The decoder's predictor, with drafts of these ids only."""
    stored = decoder.opened.drafter
    assert stored is not None
    return LatentPredictorDrafter(stored.config, stored.weights, decoder.llama, torch.tensor(ids))


@torch.inference_mode()
def joint_distribution(
    export: Path, sampling: Sampling, prompt: list[int], length: int
) -> dict[tuple[int, ...], float]:
    """The base model's distribution of `length` tokens after `prompt`, from transformers' forward over every prefix."""
    model = reference_model(export, torch.float64)
    every = list(itertools.product(range(model.config.vocab_size), repeat=length))
    p = sampling.probabilities(model(torch.tensor([[*prompt, *tokens] for tokens in every])).logits)
    p = p[:, len(prompt) - 1 : -1].gather(2, torch.tensor(every)[:, :, None])
    return dict(zip(every, p[:, :, 0].prod(dim=1).tolist(), strict=True))
