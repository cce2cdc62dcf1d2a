"""`nextlat export`: a checkpoint of any layout becomes a plain Llama directory, with what drafts for it in a folder.

Neither DeepSpeed nor the training package is needed. The result is compared with the training forward pass before it
appears under its name, and it appears only when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from nextlat_dist.checkpoint.commit import find_checkpoint, verify
from nextlat_dist.checkpoint.tensors import load_full_weights
from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import ParallelConfig, RunConfig
from nextlat_dist.data.loader import RowLoader
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError, require_extra
from nextlat_dist.files import CONFIG_FILE as RUN_CONFIG_FILE
from nextlat_dist.files import EXPORT_REPORT_FILE, TOKENIZER_FILE, whole_folder, writing
from nextlat_dist.huggingface.base import save_base_weights
from nextlat_dist.huggingface.destination import LISTED, destination, listed
from nextlat_dist.huggingface.draft_vocabulary import check_size, count_run_data, coverage, most_frequent
from nextlat_dist.huggingface.drafters.catalogue import drafter_kind
from nextlat_dist.huggingface.drafters.format import DrafterKind, save_drafter, write_draft_vocabulary
from nextlat_dist.huggingface.forms.catalogue import FORMS
from nextlat_dist.huggingface.tokenizer import compare, export_tokenizer, special_ids
from nextlat_dist.huggingface.weights import llama_config, to_llama
from nextlat_dist.model.sharding import sharding_rules

CHECKED_ROWS = 4
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    check_logits: bool = True,
    draft_vocabulary: int = 0,
    tokenizer_files: bool = True,
) -> dict[str, Any]:
    """Write `output` from a committed checkpoint (or the newest one in a directory of them); return the export report.

    Args:
        dtype: "fp32" or "bf16"; None: the precision the run trained in.
        check_logits: run the training forward pass and `LlamaForCausalLM` on the same rows, both in fp32, and report
            `max_logit_difference`.
        draft_vocabulary: draft from so many of the run's most frequent training tokens; 0: from all ids.
        tokenizer_files: write the tokenizer's Hugging Face form; if not, sentencepiece's file alone.

    Raises:
        UserError: no checkpoint, a half-written or damaged one, `output` holds something that no export wrote or
            cannot be written, a draft vocabulary for a run without a latent predictor, without its training data or of
            a wrong size, or a tokenizer whose Hugging Face form gives other ids.
    """
    source = find_checkpoint(checkpoint)
    if source is None:
        raise UserError(
            f"there is no checkpoint under {checkpoint}; give --checkpoint the checkpoints of a finished run"
        )
    folder = destination(output)
    if check_logits:
        purpose = "comparing logits with the training forward pass (--no-verify leaves it out)"
        require_extra("train", "megatron.core", purpose=purpose)
    verify(source, lambda name: "/" not in name)
    config = config_from_dict(yaml.safe_load((source / RUN_CONFIG_FILE).read_text()))
    drafter = config.objective.entry.drafter
    kind = None if drafter is None else drafter_kind(drafter)
    draft_ids, draft_share = _draft_vocabulary(config, kind, draft_vocabulary)
    stored_dtype = _DTYPES[dtype or config.training.precision]
    canonical = {
        name: tensor.to(stored_dtype) for name, tensor in load_full_weights(source, sharding_rules(config)).items()
    }

    report: dict[str, Any] = {"checkpoint": source.name, "dtype": str(stored_dtype).removeprefix("torch.")}
    loader = _loader(config)
    with whole_folder(folder) as temporary:
        with writing(output):
            tokenizer = _save_tokenizer(source / TOKENIZER_FILE, temporary, config, tokenizer_files)
            ids = special_ids(tokenizer) if tokenizer is not None else dict.fromkeys(TOKEN_IDS)
            base_sha256 = save_base_weights(temporary, to_llama(canonical, config, ids["eos_token_id"]))
            _write_json(temporary / "config.json", llama_config(config, stored_dtype, ids))
            _write_json(temporary / "generation_config.json", {"_from_model_config": True, **ids})
        report["base_weights_sha256"] = base_sha256
        if tokenizer is not None and tokenizer_files:
            report |= compare(tokenizer, temporary, [] if loader is None else _sample_texts(loader, tokenizer))
        if kind is not None:
            drafter_config, tensors = kind.of_checkpoint(canonical, config, base_sha256)
            with writing(output):
                save_drafter(temporary, kind, drafter_config, tensors)
        if kind is not None and draft_ids is not None:
            write_draft_vocabulary(temporary / kind.name, draft_ids)
            report |= {"draft_vocabulary_size": len(draft_ids), "draft_vocabulary_coverage": draft_share}
        if check_logits:
            rows, eos = _rows(config, loader), ids["eos_token_id"]
            report["max_logit_difference"] = max_logit_difference(canonical, config, temporary, rows, eos)
        with writing(output):
            _write_json(temporary / EXPORT_REPORT_FILE, {**report, LISTED: listed(temporary)})
        if destination(output) != folder:  # minutes later: what came meanwhile is not replaced, either
            raise UserError(f"{output} leads to another folder than when the export began; run it again")
    return report


def _save_tokenizer(model: Path, export: Path, config: RunConfig, files: bool) -> Tokenizer | None:
    """Write the run's tokenizer, with its Hugging Face form if `files`; None where the checkpoint has none."""
    if not model.is_file():
        return None
    if files:
        export_tokenizer(model, export, config.max_position_embeddings)
    else:
        shutil.copyfile(model, export / TOKENIZER_FILE)
    return Tokenizer(model)


def _draft_vocabulary(config: RunConfig, kind: DrafterKind | None, size: int) -> tuple[torch.Tensor | None, float]:
    """The ids to draft from (None: all) and the share of the training tokens that they are."""
    if size == 0:
        return None, 1.0
    if kind is None or not kind.draft_vocabulary:
        raise UserError(
            f"draft_vocabulary is {size}, but a run with objective.name {config.objective.name} has no latent "
            "predictor to draft with; leave --draft-vocabulary out"
        )
    check_size(size, config.model.vocab_size)
    try:
        counted = count_run_data(config)
    except UserError as error:
        raise UserError(
            f"the draft vocabulary is counted from the run's training data, but {error} (or export without "
            "--draft-vocabulary and add it later with `nextlat calibrate --draft-vocabulary N --data DATASET`)"
        ) from None
    ids = most_frequent(counted, size)
    return ids, coverage(counted, ids)


def max_logit_difference(
    canonical: dict[str, torch.Tensor],
    config: RunConfig,
    export: Path,
    tokens: torch.Tensor,
    eos_token_id: int | None = None,
) -> float:
    """Largest absolute difference between the training forward pass and transformers' class of the base, both fp32, on
    tokens [b, s].
    """
    from transformers import AutoModelForCausalLM

    ours = training_logits(canonical, config, tokens, eos_token_id)
    FORMS[config.objective.entry.model_type].register()
    llama = AutoModelForCausalLM.from_pretrained(
        str(export), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    with torch.no_grad():
        theirs = llama.eval()(tokens).logits
    return float((ours - theirs).abs().max())


def training_logits(
    canonical: dict[str, torch.Tensor], config: RunConfig, tokens: torch.Tensor, eos_token_id: int | None = None
) -> torch.Tensor:
    """Logits [b, s, vocab] of the Megatron-Core layers, in fp32 on one rank, every row one document."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, layer_list
    from nextlat_dist.parallel.device import third_parties
    from nextlat_dist.parallel.dims import ParallelDims

    single = dataclasses.replace(config, parallel=ParallelConfig())
    with third_parties(), torch.no_grad():
        dims = ParallelDims.initialize(single.parallel)
        stack: Any = LayerStack(layer_list(single, dims, torch.float32)).eval()
        for name, parameter in canonical_parameters(stack):
            parameter.copy_(canonical[name])
        padded = torch.cat([tokens, tokens[:, -1:]], dim=1)  # a row carries one token more than it has positions
        inputs, objective = _run(stack, padded), stack.layers[-1]
        if config.objective.entry.before is not None:  # a second stack, whose state of the end alone decoding has
            assert eos_token_id is not None
            end = _run(stack, padded.new_full((1, 2), eos_token_id)).backward
            states = objective.next_token_states(inputs, end[0, 0])
        elif hasattr(objective, "next_token_states"):
            states = objective.next_token_states(inputs)
        else:
            states = inputs.hidden
        logits: torch.Tensor = objective.output_layer.logits(states, inputs.tied_weight)
    return logits.transpose(0, 1)[..., : config.model.vocab_size]


def _run(stack: Any, tokens: torch.Tensor) -> Any:
    """What the objective is called with, for tokens [b, s + 1], every row one document."""
    from nextlat_dist.model.rows import Batch

    batch = Batch.of(tokens, torch.zeros_like(tokens), torch.ones_like(tokens))
    return stack.run(batch.message, stop=-1)


def _loader(config: RunConfig) -> RowLoader | None:
    """The run's validation (or training) data if it is still where the config says, else None."""
    datasets = [config.data.validation, *(source.path for source in config.data.train_sources)]
    for dataset in datasets:
        if dataset is None:
            continue
        try:
            return RowLoader(
                dataset,
                sequence_length=config.data.sequence_length,
                packing=config.data.packing,
                global_batch_size=CHECKED_ROWS,
                seed=0,
                shuffle=False,
                data_parallel_rank=0,
                data_parallel_size=1,
            )
        except UserError:
            continue
    return None


def _rows(config: RunConfig, loader: RowLoader | None) -> torch.Tensor:
    """Token rows [b, s] for the comparison: real text where there is any, else fixed random ids."""
    if loader is not None:
        return torch.from_numpy(loader.next_batch().tokens[:, :-1]).long()
    generator = torch.Generator().manual_seed(0)
    shape = (CHECKED_ROWS, config.data.sequence_length)
    return torch.randint(config.model.vocab_size, shape, generator=generator)


def _sample_texts(loader: RowLoader, tokenizer: Tokenizer) -> list[str]:
    """Text of some rows; a row may begin or end inside a character, whose bytes are dropped."""
    texts = [tokenizer.decode(row.tolist()) for row in loader.next_batch().tokens]
    return [text.strip("�") for text in texts]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
