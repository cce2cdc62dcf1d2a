"""Measure what self-speculative decoding buys on given prompts: speed, acceptance, and whether it is lossless.

    evaluate_speculative(exports, prompts, *, rival=None, progress=True, draft_lengths=None, temperatures=(0.0, 1.0),
                         batch_sizes=(1,), max_new_tokens=128, prompts_per_domain=8, …) -> Report
    measure(exports by name, prompts, Options(…)) -> Measured                the same as records

The baseline is draft length 0 of the same code. All methods (every draft length and adaptive of every export, and
Hugging Face) run on the same batches of prompts (`trials`), and are compared within trials (`paired_statistics`, which
also says how the best fixed length is chosen without hindsight). EOS is ignored, so that every method writes equally
many tokens. The speed of a batch is all its tokens after the first ones, over the wall time of the cycles.

Command: `nextlat evaluate speculative --export DIR --prompts FILE|DIR… --json FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.exports import named_exports
from nextlat_dist.evaluation.speculative import pictures
from nextlat_dist.evaluation.speculative.comparison import CPU, CellComparison, compare
from nextlat_dist.evaluation.speculative.methods import encode_prompts, methods_of
from nextlat_dist.evaluation.speculative.options import FIXED_LENGTHS, Length, Options
from nextlat_dist.evaluation.speculative.records import HUGGING_FACE, MTP, NEXTLAT, Method, MethodInCell, rows_of
from nextlat_dist.evaluation.speculative.step_costs import (
    MEASURED_ROUNDS,
    ExportCosts,
    MethodSplit,
    measure_costs,
    split_cycles,
)
from nextlat_dist.evaluation.speculative.summary import (
    CAVEAT,
    claims,
    greedy_sentence,
    headline,
    summarise,
    tables,
)
from nextlat_dist.evaluation.speculative.trials import (
    Decode,
    GreedyDifference,
    Trial,
    over_all_domains,
    plan_trials,
    run_trials,
)
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.loading import load
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.tables import table

SMALL_BATCH, FEW_ROUNDS = 8, 7  # larger batches have steps so long that a few say enough
TAKEN_NAMES = (HUGGING_FACE, CPU.removesuffix("_"))  # numbers of other kinds begin so


@dataclass(frozen=True)
class Measured:
    """Attributes:
    models: names of the exports, the main one first.
    prompts: how many.
    """

    models: tuple[str, ...]
    options: Options
    dtype: str
    prompts: int
    rows: list[MethodInCell]
    cells: list[CellComparison]
    costs: list[ExportCosts]
    splits: list[MethodSplit]
    differences: list[GreedyDifference]


def evaluate_speculative(
    exports: Path | str | Sequence[Path | str],
    prompts: Sequence[Path],
    *,
    rival: Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Measure, and return the report.

    Args:
        exports: `[name=]DIR` each, written by `nextlat export`; the first is the main one and must have something to
            draft with. Without a name it is called `nextlat`. The others have the same tokenizer and get the draft
            lengths that they can do.
        prompts: prompt files or folders, see `inference.prompts`; not those that an export was calibrated with.
        rival: one more export, called `mtp`.
        options: the fields of `Options`.

    Raises:
        UserError: nothing to draft with, not calibrated, bad prompts, options out of range, exports of different
            tokenizers, or a prompt that does not fit into the context.
    """
    listed: Sequence[Path | str] = [exports] if isinstance(exports, (Path, str)) else exports
    texts = [*map(str, listed), *([] if rival is None else [f"{MTP}={rival}"])]
    return report_of(measure(by_name(texts), prompts, Options(**options), progress))


def by_name(texts: Sequence[str]) -> dict[str, Path]:
    """Exports by name, from `[name=]DIR` each."""
    for first in named_exports(texts[:1]):
        if str(first.path) == str(Path(texts[0])):  # it was given no name
            texts = [f"{NEXTLAT}={first.path}", *texts[1:]]
    found: dict[str, Path] = {}
    for export in named_exports(texts):
        if export.name in found:
            raise UserError(f"two exports are called {export.name!r}; tell them apart with --export name=DIR")
        if export.name in TAKEN_NAMES:
            raise UserError(f"an export is called {export.name!r}, as other numbers of the report are; rename it")
        found[export.name] = export.path
    return found


def measure(exports: Mapping[str, Path], prompts: Sequence[Path], options: Options, progress: bool = True) -> Measured:
    """Everything that the report is made of, as records."""
    decoders = {name: load(path) for name, path in exports.items()}
    main = next(iter(decoders.values()))
    lengths = _draft_lengths(main, options.draft_lengths)
    options = replace(options, draft_lengths=lengths)
    domains = encode_prompts(
        decoders,
        list(prompts),
        per_domain=options.prompts_per_domain,
        prompt_tokens=options.prompt_tokens,
        max_new_tokens=options.max_new_tokens,
    )
    trials = plan_trials(domains, options.batch_sizes, options.temperatures, options.repeats, options.seed)
    methods = methods_of(decoders, lengths, options.max_new_tokens, options.hugging_face)
    _warm_up(trials, decoders, methods)
    done = run_trials(trials, methods, decoders, progress)
    cells = over_all_domains(done)
    return Measured(
        models=tuple(decoders),
        options=options,
        dtype=str(main.llama.embedding.dtype).removeprefix("torch."),
        prompts=sum(map(len, domains.values())),
        rows=rows_of(cells),
        cells=compare(cells),
        costs=_costs(trials, decoders, options, lengths),
        splits=_splits(trials, methods, decoders, options.max_new_tokens),
        differences=done.differences,
    )


def report_of(measured: Measured) -> Report:
    """Its tables, sentences, pictures and JSON."""
    summary = summarise(measured.cells) | headline(measured.cells, measured.rows) | _greedy(measured)
    summary["prompts"] = measured.prompts
    for entry in measured.costs:  # `b8_draft_cost`; those of an export `mtp` begin with `mtp_`
        prefix = "" if entry.model == measured.models[0] else f"{entry.model}_"
        summary |= entry.steps.named(f"{prefix}b{entry.steps.batch_size}_")
    verdicts = [claim.sentence for claim in claims(measured.cells)]
    sentences = [*(entry.sentence for entry in measured.costs), *verdicts]
    if "greedy_identical" in summary:
        sentences += [greedy_sentence(summary), CAVEAT]
    return Report(
        command="nextlat evaluate speculative",
        options=asdict(measured.options) | {"dtype": measured.dtype},
        summary=summary,
        rows=measured.rows,
        extra={
            "models": list(measured.models),
            "cells": [entry.to_json() for entry in measured.cells],
            "verdicts": verdicts,
            "costs": [entry.to_json() for entry in measured.costs],
            "cycle_split": [entry.to_json() for entry in measured.splits],
            "greedy_differences": [entry.to_json() for entry in measured.differences],
            "caveat": CAVEAT,
        },
        text="\n".join([*(f"{table(*one)}\n" for one in tables(measured.cells)), *sentences]),
        pictures={
            "speedup_by_draft_length.png": partial(pictures.speedups, measured.rows, measured.models),
            "acceptance_by_position.png": partial(pictures.acceptance, measured.rows, measured.models[0]),
            "cost_split.png": partial(pictures.split, measured.splits, measured.models[0]),
        },
    )


def _draft_lengths(main: Decoder, wanted: Sequence[Length] | None) -> tuple[Length, ...]:
    if main.drafter is None:
        raise UserError(
            f"{main.export} has nothing to draft with; export a run trained with objective.name nextlat or mtp"
        )
    if wanted is None:
        usable = main.calibration is not None and main.calibrated_elsewhere is None
        return (*FIXED_LENGTHS, "adaptive") if usable else FIXED_LENGTHS
    if "adaptive" in wanted and main.calibration is None:
        raise UserError(
            f'draft_length has "adaptive", but {main.export} is not calibrated; run `nextlat calibrate` on it, or '
            "leave adaptive out"
        )
    if "adaptive" in wanted and main.calibrated_elsewhere is not None:
        raise UserError(main.calibrated_elsewhere)
    return tuple(wanted)


def _warm_up(trials: Sequence[Trial], decoders: Mapping[str, Decoder], methods: Mapping[Method, Decode]) -> None:
    """One trial of every method at every batch size that does not count: allocations, kernel caches."""
    for trial in _first_trials(trials):
        for method, decode in methods.items():
            if method.model in decoders or trial.cell.batch_size == 1:
                decode([row.ids for row in trial.prompts], trial.cell.temperature, trial.seed)


def _first_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The first trial of every batch size and temperature."""
    first: dict[tuple[int, float], Trial] = {}
    for trial in trials:
        first.setdefault((trial.cell.batch_size, trial.cell.temperature), trial)
    return list(first.values())


def _costs(
    trials: Sequence[Trial], decoders: Mapping[str, Decoder], options: Options, lengths: Sequence[Length]
) -> list[ExportCosts]:
    """Draft step and forwards by export and batch size, half-way through the first prompt's continuation."""
    ids = trials[0].prompts[0].ids
    length = len(ids) + options.max_new_tokens // 2
    ids = (ids * (length // len(ids) + 1))[:length]
    widths = [k + 1 for k in lengths if isinstance(k, int)]
    costs = []
    for model, decoder in decoders.items():
        longest = decoder.drafter.longest if decoder.drafter else 0
        own = widths if longest is None else [width for width in widths if width <= longest + 1]
        for batch_size in options.batch_sizes:
            rounds = MEASURED_ROUNDS if batch_size <= SMALL_BATCH else FEW_ROUNDS
            costs.append(ExportCosts(model, measure_costs(decoder, ids, batch_size, own, rounds)))
    return costs


def _splits(
    trials: Sequence[Trial], methods: Mapping[Method, Decode], decoders: Mapping[str, Decoder], max_new_tokens: int
) -> list[MethodSplit]:
    """What cycles spend on drafting, verifying and the rest, by method, batch size and temperature."""
    splits = []
    for trial in _first_trials(trials):
        for method in methods:
            if method.model in decoders:
                assert method.draft_length != "prompt_lookup"
                cycles = split_cycles(
                    decoders[method.model],
                    [row.ids for row in trial.prompts],
                    max_new_tokens=max_new_tokens,
                    draft_length=method.draft_length,
                    temperature=trial.cell.temperature,
                    seed=trial.seed,
                )
                splits.append(MethodSplit(method, trial.cell.batch_size, trial.cell.temperature, cycles))
    return splits


def _greedy(measured: Measured) -> dict[str, Any]:
    """Whether greedy tokens are those of plain decoding, and how near a tie they were where not."""
    if 0 not in measured.options.temperatures:
        return {}
    return {
        "greedy_identical": not measured.differences,
        "greedy_differences": len(measured.differences),
        "greedy_largest_logit_gap": max((found.logit_gap for found in measured.differences), default=0.0),
    }
