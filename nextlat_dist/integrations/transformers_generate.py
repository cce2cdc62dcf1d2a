"""Drafting inside `model.generate` of stock transformers: the engine as a `custom_generate` callable.

    model = AutoModelForCausalLM.from_pretrained(export)
    batch = tokenizer(["def ", "import "], padding=True, padding_side="left", return_tensors="pt")
    model.generate(**batch, max_new_tokens=64, custom_generate=nextlat_generate, draft_length=3)

The invariant: the result is what `model.generate` returns without `custom_generate` (greedily token by token, sampled
with the same distribution), for any draft length; whatever this engine cannot honour is refused, never ignored.
transformers keeps `streamer`, `assistant_model` and `tokenizer` from every callable: there is `on_piece`, and an own
`stop_strings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import is_export
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import DraftLength, Piece
from nextlat_dist.inference.loading import decoder_of
from nextlat_dist.inference.sampling import Sampling

# What `generate` itself makes up for a Llama. Any other model argument would have to reach the model's forward.
_MODEL_KWARGS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# One decoder per live model: building it reads the export, packs matrices and compares every weight.
_decoders: WeakKeyDictionary[torch.nn.Module, tuple[object, Decoder]] = WeakKeyDictionary()


def nextlat_generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: Any = None,
    *,
    draft_length: DraftLength | None = None,
    seed: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    on_piece: Callable[[Piece], None] | None = None,
    export: Path | str | None = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop of `model.generate(…, custom_generate=nextlat_generate)`; transformers fills in the rest.

    Args:
        model: a `LlamaForCausalLM` loaded from an export, its weights unchanged (any dtype and device).
        input_ids: [batch, width], padded on the left as `attention_mask` says.
        draft_length: as in `Decoder.generate`.
        seed: of the sampling; None: drawn from torch's global generator, so that `torch.manual_seed` repeats a call.
        stop_strings: a row ends with the token that completes one of them (in the new text; not across the prompt).
        on_piece: called with new tokens as they are settled.
        export: the directory that holds the latent predictor; None: the one that the model was loaded from.

    Returns:
        [batch, width + new] ids padded on the right, or a `GenerateDecoderOnlyOutput` with these `sequences` if
        `return_dict_in_generate`. A row ends at the model's context, where stock `generate` continues beyond it.

    Raises:
        UserError: the model is no unchanged export with a predictor, or an option that this engine does not have.
    """
    _refuse_other_modes(generation_config, model_kwargs)
    sampling = _sampling(generation_config, logits_processor)
    max_length, eos_token_ids, texts = _ends(stopping_criteria)
    texts += [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
    decoder = _decoder(model, export, needs_predictor=draft_length != 0)
    if seed is None:
        seed = 0 if sampling.greedy else int(torch.randint(1 << 62, ()))
    rows = decoder.generate(
        prompts,
        max_new_tokens=max_length - input_ids.shape[1],
        draft_length=draft_length,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        stop_token_ids=eos_token_ids,
        stop_strings=texts,
        ignore_eos=True,  # transformers' own list of EOS ids is the one that counts
        on_piece=on_piece,
    )
    pad = generation_config.pad_token_id
    if pad is None and eos_token_ids:
        pad = eos_token_ids[0]
    sequences = torch.cat([input_ids, _padded([row.token_ids for row in rows], pad).to(input_ids.device)], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


def _refuse_other_modes(config: Any, model_kwargs: dict[str, Any]) -> None:
    from transformers.generation import GenerationMode

    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(
            f"nextlat_generate searches greedily or samples, but these options ask for {mode.value.replace('_', ' ')}; "
            "leave out num_beams, penalty_alpha, dola_layers and prompt_lookup_num_tokens, or custom_generate"
        )
    asked = [name for name in _OUTPUTS if config.return_dict_in_generate and getattr(config, name)]
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        asked.append("past_key_values")
    asked += [name for name, value in model_kwargs.items() if name not in _MODEL_KWARGS and value is not None]
    if asked:
        raise UserError(f"nextlat_generate cannot honour {asked[0]}; leave {asked[0]} out, or custom_generate")


def _sampling(config: Any, processors: Sequence[Any]) -> Sampling:
    """What the logits processors of the call do, if temperature, top-k and top-p in this order can say it."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    own = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}
    values: dict[str, Any] = {}
    for processor in processors:
        name = own.get(type(processor))
        # A processor made by the caller comes before those made from options, or next to one of the same kind.
        if name is None or name in values or getattr(processor, name) != getattr(config, name) or not config.do_sample:
            raise UserError(
                f"nextlat_generate changes logits by the options temperature, top_k and top_p only, but this call has "
                f"a {type(processor).__name__}; leave out the option or the logits_processor that asks for it, or "
                "custom_generate"
            )
        values[name] = getattr(processor, name)
    return Sampling(**{"temperature": 1.0 if config.do_sample else 0.0, **values})


def _ends(criteria: Sequence[Any]) -> tuple[int, list[int], list[str]]:
    """The total length, the EOS ids and the stop strings of a call."""
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

    lengths: list[int] = []
    eos: list[int] = []
    texts: list[str] = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos += criterion.eos_token_id.tolist()
        elif type(criterion) is StopStringCriteria:
            texts += criterion.stop_strings
        else:
            raise UserError(
                f"nextlat_generate ends a row by length, EOS or stop strings only, but this call has a "
                f"{type(criterion).__name__}; leave out the option or the stopping_criteria that asks for it, or "
                "custom_generate"
            )
    return min(lengths), eos, texts


def _prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[list[int]]:
    """The tokens of each row that the mask leaves."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    visible = mask.bool()
    if not bool(visible[:, -1].all()):
        row = int(visible[:, -1].logical_not().nonzero()[0])
        raise UserError(
            f"row {row} of input_ids ends in a token that attention_mask hides, but new tokens go after the last one; "
            "pad on the left (tokenizer.padding_side = 'left')"
        )
    counted = (mask.cumsum(dim=1) - 1)[visible]
    if position_ids is not None and not torch.equal(position_ids.expand_as(input_ids)[visible], counted):
        raise UserError("nextlat_generate counts positions from 0 in every row; leave position_ids out")
    return [row[seen].tolist() for row, seen in zip(input_ids, visible, strict=True)]


def _padded(rows: list[list[int]], pad: int | None) -> torch.Tensor:
    """[batch, longest row]."""
    width = max(map(len, rows))
    if pad is None and any(len(row) < width for row in rows):
        raise UserError("the rows end at different lengths, but there is no token to fill them up; set pad_token_id")
    return torch.tensor([row + [pad or 0] * (width - len(row)) for row in rows])


def _decoder(model: Any, export: Path | str | None, *, needs_predictor: bool) -> Decoder:
    """The model's decoder, built again when its weights have changed since."""
    source = Path(export if export is not None else model.config._name_or_path)
    key = (source, [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()])
    if model not in _decoders or _decoders[model][0] != key:
        _decoders[model] = (key, _build(model, source))
    decoder = _decoders[model][1]
    if needs_predictor and decoder.drafter is None:
        raise UserError(
            f"{source} has no latent predictor to draft with; export a run trained with one, set draft_length to 0, or "
            "leave out custom_generate"
        )
    return decoder


def _build(model: Any, export: Path) -> Decoder:
    if not is_export(export):
        raise UserError(
            f"the model comes from {str(export)!r}, which is no export on this machine, so it has no latent predictor; "
            "load the model from a directory written by `nextlat export`, or name that directory with export="
        )
    embedding = model.get_input_embeddings().weight
    opened = open_export(export)
    decoder = decoder_of(opened, str(embedding.device), embedding.dtype)
    _check_unchanged(model, opened)
    return decoder


def _check_unchanged(model: Any, opened: OpenedExport) -> None:
    """Raise unless the live model is the stored one, at most cast to another dtype: the predictor belongs to that."""
    advice = "load that export again and leave it unchanged, or leave out custom_generate"
    live, stored = model.state_dict(), {"lm_head.weight": opened.weights["model.embed_tokens.weight"], **opened.weights}
    for name in sorted({*live, *stored}):
        theirs, ours = live.get(name), stored.get(name)
        if theirs is None or ours is None or not torch.equal(theirs, ours.to(theirs)):
            raise UserError(
                f"the model's {name} is not that of {opened.path}, to whose weights the latent predictor belongs; "
                f"{advice}"
            )
    fields = {**vars(opened.config), **opened.config.own}
    del fields["own"]
    for name, expected in fields.items():
        value = model.config.rope_parameters[name] if name == "rope_theta" else getattr(model.config, name)
        if value != expected:
            raise UserError(f"the model has {name} {value}, but the export in {opened.path} has {expected}; {advice}")
