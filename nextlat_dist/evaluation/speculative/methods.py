"""Who takes part in the speculative report, on what: encoded prompts, and a callable per contender.

Invariant: all contenders get the same token ids and write the same number of tokens (EOS is ignored).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.speculative.hugging_face import HuggingFace
from nextlat_dist.evaluation.speculative.trials import HUGGING_FACE, NEXTLAT, Contender, EncodedPrompt, Run, Side
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import DraftLength, Piece
from nextlat_dist.inference.prompts import load_prompts


def encode_prompts(
    decoders: Mapping[str, Decoder],
    paths: list[Path],
    *,
    per_domain: int,
    prompt_tokens: int | None,
    max_new_tokens: int,
) -> dict[str, list[EncodedPrompt]]:
    """The prompts by domain, cut behind `prompt_tokens`.

    Raises:
        UserError: bad prompts, decoders that disagree about the tokens, or a prompt too long for the context.
    """
    context = min(decoder.llama.config.max_position_embeddings for decoder in decoders.values())
    domains: dict[str, list[EncodedPrompt]] = {}
    for prompt in load_prompts(paths, per_domain):
        ids, *others = (decoder.encode(prompt.text) for decoder in decoders.values())
        if any(other != ids for other in others):
            raise UserError(
                f"the rival encodes prompt {prompt.name} of {prompt.domain} in other tokens, so that tokens per second "
                "say nothing; give a rival trained with the same tokenizer"
            )
        ids = ids[:prompt_tokens]
        if len(ids) + max_new_tokens > context:
            raise UserError(
                f"prompt {prompt.name} of {prompt.domain} has {len(ids)} tokens, and with max_new_tokens "
                f"{max_new_tokens} it exceeds the model's context of {context}; set prompt_tokens, or lower "
                "max_new_tokens"
            )
        domains.setdefault(prompt.domain, []).append(EncodedPrompt(prompt, ids))
    return domains


def sides_of(
    decoders: Mapping[str, Decoder], draft_lengths: Sequence[DraftLength], max_new_tokens: int, hugging_face: bool
) -> dict[Contender, Side]:
    """Every decoder at every draft length that it can do, and transformers without and with prompt lookup."""
    sides: dict[Contender, Side] = {}
    for model, decoder in decoders.items():
        for length in draft_lengths:
            if _can_draft(decoder, length):
                sides[Contender(model, length)] = _own_side(decoder, length, max_new_tokens)
    if hugging_face:
        llama = decoders[NEXTLAT].llama
        reference = HuggingFace(decoders[NEXTLAT].export, llama.device, llama.embedding.dtype)
        sides[Contender(HUGGING_FACE, 0)] = _outside_side(reference, False, max_new_tokens)
        sides[Contender(HUGGING_FACE, "prompt_lookup")] = _outside_side(reference, True, max_new_tokens)
    return sides


def _can_draft(decoder: Decoder, length: DraftLength) -> bool:
    if length == 0:
        return True
    if decoder.drafter is None:
        return False
    if length == "adaptive":
        return decoder.calibration is not None
    return decoder.drafter.longest is None or length <= decoder.drafter.longest


def _own_side(decoder: Decoder, length: DraftLength, max_new_tokens: int) -> Side:
    on_cpu = decoder.llama.device.type == "cpu"

    def side(prompts: list[list[int]], temperature: float, seed: int) -> Run:
        prefilled: list[float] = []

        def note(_: Piece) -> None:
            if not prefilled:  # the first piece is the prefill's
                prefilled.append(time.process_time())

        generations = decoder.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            draft_length=length,
            temperature=temperature,
            seed=seed,
            ignore_eos=True,
            on_piece=note,
        )
        return Run(generations, time.process_time() - prefilled[0] if on_cpu else None)

    return side


def _outside_side(reference: HuggingFace, prompt_lookup: bool, max_new_tokens: int) -> Side:
    def side(prompts: list[list[int]], temperature: float, seed: int) -> Run:
        (prompt,) = prompts
        return reference.generate(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, prompt_lookup=prompt_lookup
        )

    return side
