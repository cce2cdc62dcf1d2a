"""From an export and text to an export whose latent predictor was fitted afterwards: `fit_drafter`.

The base is read and never changed: the new export has it file by file. Documents are what they are in training: rows of
the dataset in a shuffled order, and every document in a row a context of its own.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextlat_dist.config.entries import PREDICTORS, resolve
from nextlat_dist.data.loader import RowLoader
from nextlat_dist.data.packing import RowBatch
from nextlat_dist.errors import UserError
from nextlat_dist.files import EXPORT_REPORT_FILE, TOKENIZER_FILE, file_sha256, whole_folder, writing
from nextlat_dist.fitting.fit import Form, Windows, first_weights, fit
from nextlat_dist.huggingface.destination import LISTED, destination, listed
from nextlat_dist.huggingface.drafters.latent_predictor import LatentPredictorConfig, save_predictor
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference.engine.llama import Llama
from nextlat_dist.inference.loading import llama_of
from nextlat_dist.reporting.console import Progress, say


def fit_drafter(
    model: Path,
    data: Path | str,
    output: Path,
    *,
    steps: int = 600,
    rows: int = 2,
    length: int | None = None,
    horizon: int | None = None,
    width: int | None = None,
    fresh: bool = False,
    lr: float = 2e-3,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write `output`: the base of the export `model` with a latent predictor that was fitted on it; return its report.

    Args:
        data: a dataset written by `nextlat-data`, or its URL.
        steps: of AdamW, on `rows` rows of `length` tokens each (None: 256, or the model's context if shorter).
        horizon: steps that it is rolled ahead; None: as the export's predictor was trained, 2 if it has none.
        width: of a new predictor; None: as the export's has it, twice the hidden size if it has none.
        fresh: start from scratch; otherwise the export's own predictor, if it has one, is where the fit starts.
        device: "cuda" if there is one, else "cpu".

    Raises:
        UserError: no export, or of another form than a plain Llama; no data, or of another tokenizer; a number out of
            range; an `output` that holds something that no export wrote; a fit whose loss is not finite.
    """
    opened = open_export(model)
    if opened.config.model_type != "llama":
        raise UserError(
            f"{model} is of model_type {opened.config.model_type}, whose states no predictor advances; give "
            "--model the export of a run with objective.name next_token, nextlat or mtp"
        )
    folder = destination(output)
    for flag, number in {"--steps": steps, "--rows": rows, "--horizon": horizon, "--width": width}.items():
        if number is not None and number < 1:
            raise UserError(f"{flag} is {number}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must not be negative")
    config, weights = _first(opened, width, horizon, fresh, seed)
    if not 0 < lr < 1e3:
        raise UserError(f"--lr is {lr:g}; it must be positive, and below 1000")
    context = opened.config.max_position_embeddings
    length = min(256, context) if length is None else length
    if not config.horizon < length <= context:
        raise UserError(
            f"--length is {length}; it must be above --horizon {config.horizon} and at most the context, {context}"
        )
    llama = llama_of(opened, device, torch.float32)
    loader = _loader(data, rows, length, seed, opened)
    losses: list[float] = []
    started = time.monotonic()
    shown = Progress("fitting", steps, shown=progress)

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        shown.add(rows * length)

    try:
        fitted = fit(
            _form(config),
            {name: weight.to(llama.embedding) for name, weight in weights.items()},
            _windows(llama, loader, config.horizon),
            embedding=llama.embedding,
            head_weight=llama.head_weight,
            steps=steps,
            epsilon=config.layer_norm_epsilon,
            lr=lr,
            on_step=note,
        )
    except FloatingPointError as error:
        raise UserError(f"the predictor diverges: {error}; lower --lr {lr:g}") from None
    finally:
        loader.close()
    last = losses[-max(1, steps // 10) :]
    fit_report = {
        "steps": steps,
        "tokens": steps * rows * length,
        "horizon": config.horizon,
        "width": config.predictor_hidden_size,
        "began_with": "a new one" if fresh or not _drafts(opened) else "its own",
        "seconds": time.monotonic() - started,
        "loss_first": losses[0],
        "loss_last": sum(last) / len(last),
    }
    return _write(folder, output, opened, config, fitted, fit_report)


def _first(
    opened: OpenedExport, width: int | None, horizon: int | None, fresh: bool, seed: int
) -> tuple[LatentPredictorConfig, Mapping[str, Tensor]]:
    """The predictor that the fit begins with."""
    base, own = opened.config, opened.drafter if _drafts(opened) else None
    if own is not None and not fresh:
        if width not in (None, own.config.predictor_hidden_size):
            raise UserError(
                f"--width is {width}, but the predictor in {opened.path} has {own.config.predictor_hidden_size}; leave "
                "--width out, or start from scratch with --fresh"
            )
        return replace(own.config, horizon=horizon or own.config.horizon), own.weights
    config = LatentPredictorConfig(
        hidden_size=base.hidden_size,
        predictor_hidden_size=width or (own.config.predictor_hidden_size if own else 2 * base.hidden_size),
        vocab_size=base.vocab_size,
        horizon=horizon or (own.config.horizon if own else 2),
        layer_norm_epsilon=1e-5,
        base_weights_sha256=opened.base_sha256,
    )
    return config, first_weights(base.hidden_size, config.predictor_hidden_size, seed)


def _drafts(opened: OpenedExport) -> bool:
    """Whether the export has a latent predictor."""
    return opened.drafter is not None and isinstance(opened.drafter.config, LatentPredictorConfig)


def _form(config: LatentPredictorConfig) -> Form:
    form: Form = resolve(PREDICTORS.find(config.fusion).drafting)
    return form


def _loader(data: Path | str, rows: int, length: int, seed: int, opened: OpenedExport) -> RowLoader:
    tokenizer = opened.path / TOKENIZER_FILE  # of the run; an export without one has its vocabulary alone to compare
    return RowLoader(
        data,
        sequence_length=length - 1,  # a row has one token more
        packing="concat",
        global_batch_size=rows,
        seed=seed,
        shuffle=True,
        data_parallel_rank=0,
        data_parallel_size=1,
        vocab_size=opened.config.vocab_size,
        tokenizer_sha256=file_sha256(tokenizer) if tokenizer.is_file() else None,
    )


def _windows(llama: Llama, loader: RowLoader, horizon: int) -> Iterator[Windows]:
    """Of batch after batch; one whose documents are all shorter than the horizon gives none and is passed over."""
    while True:
        pieces = [piece.to(llama.device) for piece in documents(loader.next_batch()) if len(piece) > horizon]
        if pieces:
            states = _states(llama, pieces)
            yield Windows.joined([Windows.of(own, piece, horizon) for own, piece in zip(states, pieces, strict=True)])


def documents(batch: RowBatch) -> list[Tensor]:
    """The tokens int64 of every document in every row, apart; padding is none."""
    parts = []
    for tokens, numbers in zip(batch.tokens, batch.document_ids, strict=True):
        found, sizes = torch.unique_consecutive(torch.from_numpy(numbers), return_counts=True)
        own = torch.from_numpy(tokens).long().split(sizes.tolist())
        parts += [part for part, number in zip(own, found.tolist(), strict=True) if number >= 0]
    return parts


@torch.no_grad()
def _states(llama: Llama, pieces: list[Tensor]) -> list[Tensor]:
    """h [s, hidden] of each piece, read from its beginning."""
    counts = [len(piece) for piece in pieces]
    cache = llama.new_cache(len(pieces), max(counts), layers=len(llama.layers))
    return list(llama.forward(torch.cat(pieces), counts, cache).split(counts))


def _write(
    folder: Path,
    output: Path,
    opened: OpenedExport,
    config: LatentPredictorConfig,
    weights: dict[str, Tensor],
    fit_report: dict[str, Any],
) -> dict[str, Any]:
    report_path = opened.path / EXPORT_REPORT_FILE
    before = json.loads(report_path.read_text()) if report_path.is_file() else {}
    report = {key: value for key, value in before.items() if key != LISTED and not key.startswith("draft_vocabulary")}
    report |= {"base_weights_sha256": opened.base_sha256, "fitted_drafter": fit_report}
    with whole_folder(folder) as temporary, writing(output):
        for path in sorted(opened.path.iterdir()):
            if path.is_file() and path.name != EXPORT_REPORT_FILE:
                shutil.copyfile(path, temporary / path.name)
        save_predictor(temporary, config, weights)
        (temporary / EXPORT_REPORT_FILE).write_text(json.dumps({**report, LISTED: listed(temporary)}, indent=2) + "\n")
    say(f"the drafter and its base are in {output}")
    return report
