"""Self-speculative decoding: draft with the export's drafter, verify with one transformer forward.

    Decoder.generate(prompts, *, max_new_tokens, draft_length=None, temperature=0.0, …) -> list[Generation]
    Decoder.stream(prompt, *, max_new_tokens, …) -> Iterator[Piece]

The invariant: the output distribution is the base model's for every draft length and every drafter; greedy output is
equal token by token, up to the rounding of near ties. Draft length 0 is plain decoding by the same code, the baseline
of every speedup.

Command: `nextlat generate --export DIR --prompt TEXT`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.opened import OpenedExport
from nextlat_dist.inference import arguments
from nextlat_dist.inference.drafting import Drafter
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.engine.llama import Llama
from nextlat_dist.inference.generation import Cycle, DraftLength, Generation, Piece, Request
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from nextlat_dist.inference.stopping import Stops
from nextlat_dist.reporting.log import logger
from nextlat_dist.reporting.report import machine

log = logger(__name__)


class Decoder:
    """A base model with its drafter, if it has one, and the drafter's calibration, if there is one."""

    def __init__(self, opened: OpenedExport, llama: Llama, drafter: Drafter | None) -> None:
        """`drafter`: that of the export or another one; None drafts nothing."""
        self.opened = opened
        self.llama = llama
        self.drafter = drafter
        self._said_elsewhere = self._said_sampling = False
        self.bos_token_id, self.eos_token_ids = opened.special_tokens.bos, opened.special_tokens.eos

    @property
    def export(self) -> Path:
        """The directory of the export."""
        return self.opened.path

    @property
    def drafter_directory(self) -> Path | None:
        """Where the export keeps its drafter's weights and calibration; None: nothing drafts."""
        stored = None if self.drafter is None else self.opened.drafter
        return None if stored is None else stored.directory

    @cached_property
    def calibration(self) -> Calibration | None:
        """That of the drafter, if there is one; read when drafting first depends on it, so that a damaged file does not
        keep anybody from calibrating again.
        """
        return Calibration.load(self.drafter_directory) if self.drafter_directory else None

    @cached_property
    def machine_facts(self) -> dict[str, Any]:
        """What the costs of steps depend on, by the names of `Calibration.measured_on`."""
        found = machine()
        names = ("gpus",) if self.llama.device.type == "cuda" else ("cpu", "torch_threads")
        return {name: found[name] for name in names} | {"dtype": str(self.llama.embedding.dtype).removeprefix("torch.")}

    @property
    def calibrated_elsewhere(self) -> str | None:
        """In a sentence, on which other machine the costs of the calibration were measured; None: on this one, or they
        do not say.
        """
        calibration = self.calibration
        if calibration is None:
            return None
        here, there = self.machine_facts, calibration.measured_on
        differing = [name for name in here if name in there and _fact(name, here) != _fact(name, there)]
        if calibration.device != self.llama.device.type:
            differing, here, there = ["device"], {"device": self.llama.device.type}, {"device": calibration.device}
        if not differing:
            return None
        was, runs = (", ".join(_fact(name, facts) for name in differing) for facts in (there, here))
        return (
            f"{self.export} was calibrated on {was}, but runs on {runs}, where costs differ; run `nextlat calibrate` "
            "there, or set draft_length to a number"
        )

    def _calibrated_here(self) -> bool:
        """For those who asked for nothing; that it does not count here is said once."""
        elsewhere = self.calibrated_elsewhere
        if elsewhere is not None and not self._said_elsewhere:
            self._said_elsewhere = True
            log.warning("%s; drafting a fixed length", elsewhere)
        return self.calibration is not None and elsewhere is None

    def _compare_sampling(self, calibrated: Acceptance, sampling: Sampling) -> None:
        """Say once that drafts were observed with tokens cut in another way; the text is right all the same."""
        facts = [(each.top_k, each.top_p) for each in (calibrated, sampling)]
        if sampling.temperature > 0 and calibrated.temperature > 0 and facts[0] != facts[1] and not self._said_sampling:
            self._said_sampling = True
            (was_k, was_p), (k, p) = facts
            log.warning(
                "%s was calibrated with top_k %d and top_p %g, but samples with top_k %d and top_p %g: adaptive "
                "lengths may not be the fastest; run `nextlat calibrate --top-k %d --top-p %g`",
                *(self.export, was_k, was_p, k, p, k, p),
            )

    @property
    def tokenizer(self) -> Any:
        """The export's `transformers` tokenizer."""
        return self.opened.tokenizer

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, starting with BOS as every training document does."""
        ids: list[int] = self.tokenizer.encode(arguments.text("the prompt", prompt), add_special_tokens=False)
        return [*([] if self.bos_token_id is None else [self.bos_token_id]), *ids]

    def continuation_text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text that `token_ids` add after the prompt (its leading space included, special tokens left out)."""
        prefix: str = self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
        whole: str = self.tokenizer.decode([*prompt_ids, *token_ids], skip_special_tokens=True)
        if not whole.startswith(prefix):  # the prompt ends inside a character
            prefix, whole = "", self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return whole[len(prefix) :]

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_new_tokens: int,
        draft_length: DraftLength | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = 0,
        stop_token_ids: Collection[int] = (),
        stop_strings: Collection[str] = (),
        ignore_eos: bool = False,
        batch_size: int | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        on_cycle: Callable[[Cycle], None] | None = None,
    ) -> list[Generation]:
        """Continue every prompt.

        Args:
            prompts: texts (a BOS is put in front), or token ids taken as they are (an empty one becomes a BOS).
            max_new_tokens: a continuation is shorter if it meets a stop or fills the model's context.
            draft_length: tokens drafted per cycle; 0 is plain decoding; "adaptive" drafts what pays, as calibrated;
                None is adaptive for a calibrated export, else 3, else 0 if there is no drafter.
            seed: row r of a call with seed s draws the numbers of row 0 of a call with seed s + r, so a row does not
                depend on its neighbours. (How much an adaptive row drafts depends on the batch size, whose costs it
                weighs: its distribution is the same at every size, its tokens at temperature > 0 are not.) None: drawn
                from torch's global generator, so that `torch.manual_seed` repeats a call.
            stop_token_ids: further ids that end a continuation, besides the export's EOS (unless `ignore_eos`).
            stop_strings: texts that end a continuation; the result's text ends before the first one.
            batch_size: prompts decoded together; None: all of them.
            on_piece: called with new tokens as they are settled.
            on_cycle: called after every cycle with what it took; on a GPU this makes every phase wait for the device.

        Raises:
            UserError: an option out of range, nothing to draft with, a prompt that is empty, too long or foreign.
        """
        request = self._request(
            max_new_tokens, draft_length, Sampling(temperature, top_k, top_p), stop_token_ids, stop_strings, ignore_eos
        )
        prompts = arguments.prompts(prompts)
        encoded = [self._prompt_ids(prompt, row) for row, prompt in enumerate(prompts)]
        size = max(1, len(prompts)) if batch_size is None else arguments.whole("batch_size", batch_size, 1)
        seed = _seed(seed)
        generations: list[Generation] = []
        for start in range(0, len(prompts), size):
            batch = self._batch(encoded[start : start + size], request, seed + start, on_cycle)
            for piece in batch.run():
                if on_piece:
                    on_piece(replace(piece, row=start + piece.row))
            generations += batch.results
        for prompt, ids, generation in zip(prompts, encoded, generations, strict=True):
            if isinstance(prompt, str):
                generation.text = request.stops.before(self.continuation_text(ids, generation.token_ids))
        return generations

    def stream(
        self,
        prompt: str | list[int],
        *,
        max_new_tokens: int,
        draft_length: DraftLength | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = 0,
        stop_token_ids: Collection[int] = (),
        stop_strings: Collection[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """The pieces of one continuation as they are settled; the arguments and errors of `generate`.

        To stop early, stop iterating.
        """
        request = self._request(
            max_new_tokens, draft_length, Sampling(temperature, top_k, top_p), stop_token_ids, stop_strings, ignore_eos
        )
        return self._batch([self._prompt_ids(prompt, 0)], request, _seed(seed), None).run()

    def _batch(
        self, prompts: list[list[int]], request: Request, seed: int, on_cycle: Callable[[Cycle], None] | None
    ) -> DecodingEngine:
        policy = None
        if request.draft_length == "adaptive":
            assert self.calibration is not None
            assert self.drafter is not None
            policy = AdaptivePolicy(self.calibration, request.sampling.temperature, len(prompts), self.drafter.longest)
            self._compare_sampling(policy.acceptance, request.sampling)
            if len(prompts) > 1:  # see the policy's module
                request, policy = replace(request, draft_length=policy.best_length), None
        seeds = range(seed, seed + len(prompts))
        return DecodingEngine(self.llama, self.drafter, prompts, request, policy, seeds, on_cycle)

    def _request(
        self,
        max_new_tokens: int,
        draft_length: DraftLength | None,
        sampling: Sampling,
        stop_token_ids: Collection[int],
        stop_strings: Collection[str],
        ignore_eos: bool,
    ) -> Request:
        texts = arguments.stop_strings(stop_strings)
        tokens = arguments.stop_token_ids(stop_token_ids) | (frozenset() if ignore_eos else self.eos_token_ids)
        stops = Stops(tokens, texts, self.continuation_text)
        longest = arguments.whole("max_new_tokens", max_new_tokens, 1)
        return Request(longest, self._draft_length(draft_length), sampling, stops)

    def _draft_length(self, wanted: DraftLength | None) -> DraftLength:
        """A number, or "adaptive", that this decoder can do."""
        longest = self.drafter.longest if self.drafter else None
        if wanted is None:
            if self.drafter is not None and self._calibrated_here():
                return "adaptive"
            return 0 if self.drafter is None else min(3, longest or 3)
        if wanted != "adaptive" and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0):
            raise UserError(
                f'draft_length is {wanted!r}, but must be a number ≥ 0 (0 drafts nothing) or "adaptive"; '
                "change draft_length"
            )
        if wanted == 0:
            return 0
        if self.drafter is None:
            raise UserError(
                f"draft_length is {wanted}, but {self.export} has nothing to draft with; set draft_length to 0, or "
                "export a run trained with objective.name nextlat or mtp"
            )
        if wanted == "adaptive":
            if self.calibration is None:
                raise UserError(
                    f'draft_length is "adaptive", but {self.export} is not calibrated; run `nextlat calibrate` on it, '
                    "or set draft_length to a number"
                )
            if self.calibrated_elsewhere is not None:
                raise UserError(self.calibrated_elsewhere)
            return wanted
        if longest is not None and wanted > longest:
            raise UserError(
                f"draft_length is {wanted}, but the drafter of {self.export} proposes {longest} tokens at most; lower "
                "draft_length"
            )
        return wanted

    def _prompt_ids(self, prompt: str | list[int], row: int) -> list[int]:
        config, name = self.llama.config, f"prompt {row}"
        given = self.encode(arguments.text(name, prompt)) if isinstance(prompt, str) else prompt
        ids = arguments.ids(name, given, config.vocab_size, str(self.export))
        if not ids:
            if self.bos_token_id is None:
                raise UserError(f"prompt {row} is empty and {self.export} has no BOS token; give at least one token")
            ids = [self.bos_token_id]
        if len(ids) >= config.max_position_embeddings:
            raise UserError(
                f"prompt {row} has {len(ids)} tokens, which fills the model's context of "
                f"{config.max_position_embeddings}; shorten the prompt"
            )
        return ids


def _seed(wanted: int | None) -> int:
    return int(torch.randint(1 << 62, ())) if wanted is None else arguments.whole("seed", wanted, 0)


def _fact(name: str, facts: dict[str, Any]) -> str:
    value = facts[name]
    if name == "gpus" and isinstance(value, list):
        return ", ".join(sorted(set(map(str, value)))) or "no GPU"
    return f"{value} threads" if name == "torch_threads" else str(value)
