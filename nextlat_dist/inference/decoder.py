"""Self-speculative decoding: draft with the latent predictor, verify with one transformer forward.

    load(export: Path, device: str | None = None, dtype: torch.dtype | None = None) -> Decoder
    Decoder.generate(prompts, *, max_new_tokens, draft_length=3, temperature=0.0, top_k=0, top_p=1.0, seed=0,
                     stop_token_ids=(), ignore_eos=False, on_tokens=None) -> list[Generation]

The invariant: the output law is the base model's for every draft length and every predictor; greedy output is equal
token by token, up to the rounding of near ties. Draft length 0 is plain decoding by the same code, the baseline of
every speedup.

Command: `nextlat generate --export DIR --prompt TEXT`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from nextlat_dist.errors import UserError
from nextlat_dist.export.layout import load_base_weights, load_predictor, weights_sha256
from nextlat_dist.inference.drafter import Draft, LatentPredictor
from nextlat_dist.inference.llama import Llama, LlamaConfig
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.verify import verify_greedy, verify_sampled


@dataclass
class Generation:
    """The continuation of one prompt.

    `token_ids` includes the stop token, if one was met; `text` is None for prompts given as ids. A *cycle* is one
    forward after the prefill: it emits the drafted tokens that were accepted and one more, which costs no draft.
    `drafted` and `accepted` count drafted tokens (an accepted one that falls behind a stop token is not counted).
    """

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = "length"  # "stop": a stop token; "length": max_new_tokens or the context limit
    cycles: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0  # includes picking the first token
    decode_seconds: float = 0.0

    @property
    def drafted(self) -> int:
        return sum(self.drafted_by_position)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_by_position)


def load(export: Path | str, device: str | None = None, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of an export directory.

    Args:
        export: a directory written by `nextlat export`.
        device: "cuda" if there is one, else "cpu".
        dtype: fp32 on a CPU, else the dtype of the stored weights.

    Raises:
        UserError: no export, no plain Llama, or a predictor that belongs to other base weights.
    """
    export = Path(export)
    weights = load_base_weights(export)
    predictor = load_predictor(export, weights_sha256(weights))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else weights["model.embed_tokens.weight"].dtype
    llama = Llama(LlamaConfig.from_directory(export), weights, device, dtype)
    return Decoder(export, llama, LatentPredictor(predictor.config, predictor.weights, llama) if predictor else None)


class Decoder:
    """A base model with its latent predictor, if it has one. Prompts of a call are decoded one after the other."""

    def __init__(self, export: Path, llama: Llama, predictor: LatentPredictor | None) -> None:
        self.export = export
        self.llama = llama
        self.predictor = predictor
        self.bos_token_id, self.eos_token_ids = _special_tokens(export)

    @cached_property
    def tokenizer(self) -> Any:
        """The export's `transformers` tokenizer, loaded when text first needs it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.export)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, starting with BOS as every training document does."""
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=False)
        return [*([] if self.bos_token_id is None else [self.bos_token_id]), *ids]

    def continuation_text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text that `token_ids` add behind the prompt (its leading space included, special tokens left out)."""
        prefix: str = self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
        whole: str = self.tokenizer.decode([*prompt_ids, *token_ids], skip_special_tokens=True)
        if not whole.startswith(prefix):  # the prompt ends inside a character
            prefix, whole = "", self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return whole[len(prefix) :]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_new_tokens: int,
        draft_length: int = 3,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[Generation]:
        """Continue every prompt.

        Args:
            prompts: texts (a BOS is put in front), or token ids taken as they are (an empty one becomes a BOS).
            max_new_tokens: a continuation is shorter if it meets a stop token or fills the model's context.
            draft_length: tokens drafted per cycle; 0 is plain decoding.
            seed: row r of a call with seed s draws the numbers of row 0 of a call with seed s + r, so a row does not
                depend on its neighbours.
            stop_token_ids: further ids that end a continuation, beside the export's EOS (unless `ignore_eos`).
            on_tokens: called with (row, new token ids) as they are settled.

        Raises:
            UserError: an option out of range, no predictor to draft with, a prompt that is empty, too long or foreign.
        """
        sampling = Sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}, but must be ≥ 1; change max_new_tokens")
        if draft_length < 0:
            raise UserError(f"draft_length is {draft_length}, but must be ≥ 0 (0 drafts nothing); change draft_length")
        if draft_length > 0 and self.predictor is None:
            raise UserError(
                f"draft_length is {draft_length}, but {self.export} has no latent predictor; set draft_length to 0, "
                "or export a run trained with one"
            )
        stops = frozenset(stop_token_ids) | (frozenset() if ignore_eos else self.eos_token_ids)
        request = Request(max_new_tokens, draft_length, sampling, stops)
        encoded = [self._prompt_ids(prompt, row) for row, prompt in enumerate(prompts)]
        generations = []
        for row, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            settled = partial(on_tokens, row) if on_tokens else None
            generation = Row(self, ids, request, random.Random(seed + row)).decode(settled)
            if isinstance(prompt, str):
                generation.text = self.continuation_text(ids, generation.token_ids)
            generations.append(generation)
        return generations

    def _prompt_ids(self, prompt: str | list[int], row: int) -> list[int]:
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            if self.bos_token_id is None:
                raise UserError(f"prompt {row} is empty and {self.export} has no BOS token; give at least one token")
            ids = [self.bos_token_id]
        config = self.llama.config
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise UserError(
                f"prompt {row} holds token ids from {min(ids)} to {max(ids)}, but the model knows 0 to "
                f"{config.vocab_size - 1}; encode it with the tokenizer of {self.export}"
            )
        if len(ids) >= config.max_position_embeddings:
            raise UserError(
                f"prompt {row} has {len(ids)} tokens, which leaves no room in the model's context of "
                f"{config.max_position_embeddings}; shorten the prompt"
            )
        return ids


@dataclass(frozen=True)
class Request:
    """What all rows of a call share."""

    max_new_tokens: int
    draft_length: int
    sampling: Sampling
    stops: frozenset[int]


class Row:
    """One prompt being decoded: the cache, the tokens so far, and the verified state that each cycle restarts from."""

    def __init__(self, decoder: Decoder, prompt: list[int], request: Request, numbers: random.Random) -> None:
        self.llama, self.predictor = decoder.llama, decoder.predictor
        self.prompt, self.request, self.numbers = prompt, request, numbers
        self.limit = min(request.max_new_tokens, self.llama.config.max_position_embeddings - len(prompt))
        # The last emitted token is never fed back, so prompt + limit - 1 slots are enough.
        self.cache = self.llama.new_cache(1, len(prompt) + self.limit - 1)
        self.h = torch.empty(0)  # [1, hidden], the verified state that the last emitted token was picked from
        empty = [0] * request.draft_length
        self.result = Generation(drafted_by_position=empty, accepted_by_position=empty.copy())

    def decode(self, on_tokens: Callable[[list[int]], None] | None) -> Generation:
        """Run to the end; `on_tokens` gets the new tokens of the prefill and of every cycle."""
        result = self.result
        started = self._now()
        new = self.prefill()
        prefilled = self._now()
        while True:
            if on_tokens:
                on_tokens(new)
            if new[-1] in self.request.stops:
                result.finish_reason = "stop"
                break
            if len(result.token_ids) == self.limit:
                break
            new = self.cycle()
        result.prefill_seconds, result.decode_seconds = prefilled - started, self._now() - prefilled
        return result

    def prefill(self) -> list[int]:
        """Read the prompt and pick the first token."""
        self.h = self.llama.prefill(self._tensor(self.prompt), self.cache)
        _, token = self._verify(self.llama.logits(self.h), Draft([], None))
        self.result.token_ids.append(token)
        return [token]

    def cycle(self) -> list[int]:
        """Draft, verify, take back what was rejected; the new tokens, cut behind a stop token."""
        result, before = self.result, self.cache.lengths[0]
        token = result.token_ids[-1]
        # How much to draft depends on the number of tokens left, never on a drafted token that it would discard.
        drafts = min(self.request.draft_length, self.limit - len(result.token_ids) - 1)
        drafted = Draft([], None)
        if drafts:
            assert self.predictor is not None
            drafted = self.predictor.draft(self.h, token, self.request.sampling, self._uniforms(drafts))
        states = self.llama.forward(self._tensor([token, *drafted.tokens]), self.cache)[0]
        accepted, following = self._verify(self.llama.logits(states), drafted)
        self.cache.lengths = [before + 1 + accepted]
        self.h = states[accepted : accepted + 1]
        new = [*drafted.tokens[:accepted], following]
        stop = next((index for index, token in enumerate(new) if token in self.request.stops), len(new))
        new = new[: stop + 1]
        result.token_ids.extend(new)
        result.cycles += 1
        for position in range(drafts):
            result.drafted_by_position[position] += 1
            result.accepted_by_position[position] += position < min(accepted, len(new))
        return new

    def _verify(self, logits: torch.Tensor, drafted: Draft) -> tuple[int, int]:
        sampling = self.request.sampling
        if sampling.greedy:
            return verify_greedy(logits.argmax(dim=-1).tolist(), drafted.tokens)
        p = sampling.probabilities(logits)
        q = p[:0] if drafted.probabilities is None else drafted.probabilities
        return verify_sampled(p, q, drafted.tokens, self._uniforms(len(drafted.tokens) + 1))

    def _uniforms(self, count: int) -> list[float]:
        return [self.numbers.random() for _ in range(count)]

    def _tensor(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self.llama.embedding.device)

    def _now(self) -> float:
        if self.llama.embedding.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _special_tokens(export: Path) -> tuple[int | None, frozenset[int]]:
    """The BOS id, if any, and the EOS ids; `generation_config.json` overrides `config.json`."""
    merged: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = export / name
        if path.is_file():
            merged.update({key: value for key, value in json.loads(path.read_text()).items() if value is not None})
    eos = merged.get("eos_token_id", [])
    return merged.get("bos_token_id"), frozenset([eos] if isinstance(eos, int) else eos)
