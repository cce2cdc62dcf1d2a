"""The methods to compare and the prompts they continue: a callable per method, prompts as token ids.

Invariant: all methods get the same token ids and write the same number of tokens (EOS is ignored).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.speculative.hugging_face import HuggingFace
from nextlat_dist.evaluation.speculative.records import HUGGING_FACE, Method
from nextlat_dist.evaluation.speculative.trials import Decode, Decoded, EncodedPrompt
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
    """The prompts by domain, cut after `prompt_tokens`.

    Raises:
        UserError: bad prompts, decoders that disagree about the tokens, or a prompt too long for the context.
    """
    context = min(decoder.llama.config.max_position_embeddings for decoder in decoders.values())
    domains: dict[str, list[EncodedPrompt]] = {}
    for prompt in load_prompts(paths, per_domain):
        by_model = {model: decoder.encode(prompt.text) for model, decoder in decoders.items()}
        (main, ids), *others = by_model.items()
        differing = [model for model, other in others if other != ids]
        if differing:
            raise UserError(
                f"export {differing[0]} encodes prompt {prompt.name} of {prompt.domain} in other tokens than export "
                f"{main}, so that tokens per second say nothing; give exports trained with the same tokenizer"
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


def methods_of(
    decoders: Mapping[str, Decoder], draft_lengths: Sequence[DraftLength], max_new_tokens: int, hugging_face: bool
) -> dict[Method, Decode]:
    """Every decoder at every draft length that it can do, and transformers without and with prompt lookup.

    Args:
        decoders: by name; the main export is the first.
    """
    methods: dict[Method, Decode] = {}
    for model, decoder in decoders.items():
        for length in draft_lengths:
            if _can_draft(decoder, length):
                methods[Method(model, length)] = _own(decoder, length, max_new_tokens)
    if hugging_face:
        main = next(iter(decoders.values()))
        reference = HuggingFace(main.export, main.llama.device, main.llama.embedding.dtype)
        methods[Method(HUGGING_FACE, 0)] = _outside(reference, False, max_new_tokens)
        methods[Method(HUGGING_FACE, "prompt_lookup")] = _outside(reference, True, max_new_tokens)
    return methods


def _can_draft(decoder: Decoder, length: DraftLength) -> bool:
    if length == 0:
        return True
    if decoder.drafter is None:
        return False
    if length == "adaptive":
        return decoder.calibration is not None and decoder.calibrated_elsewhere is None
    return decoder.drafter.longest is None or length <= decoder.drafter.longest


def _own(decoder: Decoder, length: DraftLength, max_new_tokens: int) -> Decode:
    on_cpu = decoder.llama.device.type == "cpu"

    def decode(prompts: list[list[int]], temperature: float, seed: int) -> Decoded:
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
        return Decoded(generations, time.process_time() - prefilled[0] if on_cpu else None)

    return decode


def _outside(reference: HuggingFace, prompt_lookup: bool, max_new_tokens: int) -> Decode:
    def decode(prompts: list[list[int]], temperature: float, seed: int) -> Decoded:
        (prompt,) = prompts
        return reference.generate(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, prompt_lookup=prompt_lookup
        )

    return decode
