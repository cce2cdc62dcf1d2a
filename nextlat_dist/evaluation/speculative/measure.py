"""What self-speculative decoding buys on given prompts: speed, acceptance, and whether it is lossless.

    evaluate_speculative(export: Path, prompts: list[Path], *, rival=None, draft_lengths=None, temperatures=(0.0, 1.0),
                         batch_sizes=(1,), max_new_tokens=128, prompts_per_domain=8, prompt_tokens=None, repeats=1,
                         seed=0, hugging_face=False, json_path=None, picture_dir=None, progress=True) -> dict

The baseline is draft length 0 of the same code. All contenders (every draft length, adaptive, the same of a rival
export, Hugging Face) take turns on the same batches of prompts (`turns`), and are compared within turns (`paired`,
which also says how the best fixed length is chosen without hindsight). EOS is ignored, so that every side writes
equally many tokens. The speed of a batch is all its tokens after the first ones, over the wall time of the cycles.

Command: `nextlat evaluate speculative --export DIR --prompts FILE|DIR… --json FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.speculative import summary as numbers
from nextlat_dist.evaluation.speculative.methods import encode_prompts, sides_of
from nextlat_dist.evaluation.speculative.pictures import draw_pictures
from nextlat_dist.evaluation.speculative.step_costs import MEASURED_ROUNDS, costs_sentence, measure_costs, split_cycles
from nextlat_dist.evaluation.speculative.trials import (
    NEXTLAT,
    RIVAL,
    Contender,
    Measured,
    Side,
    Turn,
    over_all_domains,
    plan_turns,
    take_turns,
)
from nextlat_dist.evaluation.speculative.words import CAVEAT, greedy_sentence, tables, verdicts
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import DraftLength
from nextlat_dist.inference.loading import load
from nextlat_dist.reporting import report

FIXED_LENGTHS = tuple(range(11))
SMALL_BATCH, FEW_ROUNDS = 8, 7  # larger batches have steps so long that a few say enough


@dataclass(frozen=True)
class _Options:
    draft_lengths: tuple[DraftLength, ...]  # the fixed ones sorted, 0 first; then "adaptive" if asked for
    temperatures: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    max_new_tokens: int
    prompts_per_domain: int
    prompt_tokens: int | None
    repeats: int
    seed: int
    hugging_face: bool

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.max_new_tokens < 2 or not self.temperatures:
            raise UserError(
                f"repeats is {self.repeats}, max_new_tokens {self.max_new_tokens} and temperature has "
                f"{len(self.temperatures)} entries, but there must be at least 1 repeat, 2 new tokens (the prefill "
                "writes the first) and 1 temperature; change the one that is lower"
            )
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"batch_size is {list(self.batch_sizes)}, but needs numbers ≥ 1; change batch_size")
        if self.prompt_tokens is not None and self.prompt_tokens < 2:
            raise UserError(
                f"prompt_tokens is {self.prompt_tokens}, but must be ≥ 2 (BOS counts); change prompt_tokens"
            )
        if len(self.draft_lengths) < 2:
            raise UserError(
                'draft_length names nothing beside 0, the baseline; add lengths, such as 1..10 or "adaptive"'
            )


def evaluate_speculative(
    export: Path,
    prompts: list[Path],
    *,
    rival: Path | None = None,
    draft_lengths: Sequence[DraftLength] | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 128,
    prompts_per_domain: int = 8,
    prompt_tokens: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    hugging_face: bool = False,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, print the table, write JSON and pictures where asked, and return the content of the JSON.

    Args:
        export: a directory written by `nextlat export`, with something to draft with.
        prompts: prompt files or folders, see `evaluation.prompts`; not those that the export was calibrated with.
        rival: another export over the same tokenizer, trained with `objective.name: mtp`.
        draft_lengths: tokens drafted per cycle, or "adaptive"; 0 is always added. None: 0 to 10, and adaptive if the
            export is calibrated. The rival gets those that it can draft.
        batch_sizes: prompts decoded together; where a domain has fewer, it is repeated.
        prompt_tokens: longer prompts are cut behind that many tokens.
        repeats: passes over the prompts; those at temperature > 0 use further seeds.
        hugging_face: also run `transformers.generate`, with and without prompt lookup, at batch size 1.

    Raises:
        UserError: nothing to draft with, not calibrated, bad prompts, options out of range, a rival with another
            tokenizer, or a prompt that does not fit into the context.
    """
    decoders = {NEXTLAT: load(export)}
    if rival is not None:
        decoders[RIVAL] = load(rival)
    options = _Options(
        _draft_lengths(decoders[NEXTLAT], draft_lengths),
        tuple(sorted(set(temperatures))),
        tuple(sorted(set(batch_sizes))),
        max_new_tokens,
        prompts_per_domain,
        prompt_tokens,
        repeats,
        seed,
        hugging_face,
    )
    domains = encode_prompts(
        decoders, prompts, per_domain=prompts_per_domain, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens
    )
    turns = plan_turns(domains, options.batch_sizes, options.temperatures, repeats, seed)
    sides = sides_of(decoders, options.draft_lengths, max_new_tokens, hugging_face)
    _warm_up(turns, decoders, sides)
    measured = take_turns(turns, sides, decoders, progress)
    cells = over_all_domains(measured)
    rows, compared = numbers.rows_of(cells), numbers.compare(cells)
    summary = numbers.summarise(compared) | numbers.headline(compared, rows) | _greedy(measured, options)
    summary["prompts"] = sum(map(len, domains.values()))
    costs = _costs(turns, decoders, options)
    summary |= _cost_names(costs)
    described = asdict(options) | {"dtype": str(decoders[NEXTLAT].llama.embedding.dtype).removeprefix("torch.")}
    content = report.envelope("nextlat evaluate speculative", described, summary, rows) | {
        "cells": compared,
        "verdicts": verdicts(compared),
        "costs": costs,
        "cycle_split": _splits(turns, sides, decoders, max_new_tokens),
        "greedy_differences": measured.differences,
        "caveat": CAVEAT,
    }
    _show(content)
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        draw_pictures(content, picture_dir)
    return content


def _draft_lengths(decoder: Decoder, wanted: Sequence[DraftLength] | None) -> tuple[DraftLength, ...]:
    if decoder.drafter is None:
        raise UserError(
            f"{decoder.export} has nothing to draft with; export a run trained with objective.name nextlat or mtp"
        )
    if wanted is None:
        wanted = (*FIXED_LENGTHS, "adaptive") if decoder.calibration is not None else FIXED_LENGTHS
    elif "adaptive" in wanted and decoder.calibration is None:
        raise UserError(
            f'draft_length has "adaptive", but {decoder.export} is not calibrated; run `nextlat calibrate` on it, or '
            "leave adaptive out"
        )
    fixed = sorted({0, *(length for length in wanted if isinstance(length, int))})
    if fixed[0] < 0:
        raise UserError(f"a draft length is {fixed[0]}, but must be ≥ 0; change draft_length")
    return (*fixed, "adaptive") if "adaptive" in wanted else tuple(fixed)


def _warm_up(turns: Sequence[Turn], decoders: Mapping[str, Decoder], sides: Mapping[Contender, Side]) -> None:
    """One turn of every contender at every batch size that does not count: allocations, kernel caches."""
    for turn in _first_turns(turns):
        for contender, side in sides.items():
            if contender.model in decoders or turn.cell.batch_size == 1:
                side([row.ids for row in turn.prompts], turn.cell.temperature, turn.seed)


def _first_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The first turn of every batch size and temperature."""
    first: dict[tuple[int, float], Turn] = {}
    for turn in turns:
        first.setdefault((turn.cell.batch_size, turn.cell.temperature), turn)
    return list(first.values())


def _costs(turns: Sequence[Turn], decoders: Mapping[str, Decoder], options: _Options) -> list[dict[str, Any]]:
    """Draft step and forwards by model and batch size, half-way through the first prompt's continuation."""
    ids = turns[0].prompts[0].ids
    length = len(ids) + options.max_new_tokens // 2
    ids = (ids * (length // len(ids) + 1))[:length]
    widths = [k + 1 for k in options.draft_lengths if isinstance(k, int)]
    costs = []
    for model, decoder in decoders.items():
        longest = decoder.drafter.longest if decoder.drafter else 0
        own = widths if longest is None else [width for width in widths if width <= longest + 1]
        for batch_size in options.batch_sizes:
            rounds = MEASURED_ROUNDS if batch_size <= SMALL_BATCH else FEW_ROUNDS
            costs.append({"model": model, **measure_costs(decoder, ids, batch_size, own, rounds).to_json()})
    return costs


def _splits(
    turns: Sequence[Turn], sides: Mapping[Contender, Side], decoders: Mapping[str, Decoder], max_new_tokens: int
) -> list[dict[str, Any]]:
    """What cycles spend on drafting, verifying and the rest, by model, batch size, temperature and draft length."""
    splits = []
    for turn in _first_turns(turns):
        for contender in sides:
            if contender.model in decoders:
                assert contender.draft_length != "prompt_lookup"
                split = split_cycles(
                    decoders[contender.model],
                    [row.ids for row in turn.prompts],
                    max_new_tokens=max_new_tokens,
                    draft_length=contender.draft_length,
                    temperature=turn.cell.temperature,
                    seed=turn.seed,
                )
                where = {"batch_size": turn.cell.batch_size, "temperature": turn.cell.temperature}
                splits.append(
                    {"model": contender.model, **where, "draft_length": contender.draft_length, **split.to_json()}
                )
    return splits


def _greedy(measured: Measured, options: _Options) -> dict[str, Any]:
    """Whether greedy tokens are those of plain decoding, and how near a tie they were where not."""
    if 0 not in options.temperatures:
        return {}
    return {
        "greedy_identical": not measured.differences,
        "greedy_differences": len(measured.differences),
        "greedy_largest_logit_gap": max((d["logit_gap"] for d in measured.differences), default=0.0),
    }


def _cost_names(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Flat names: `b8_draft_cost`, `b8_verify_cost_4`, `b8_plain_step_seconds`; the rival's begin with `mtp_`."""
    named: dict[str, Any] = {}
    for entry in costs:
        prefix = ("" if entry["model"] == NEXTLAT else f"{entry['model']}_") + f"b{entry['batch_size']}_"
        named[prefix + "plain_step_seconds"] = entry["plain_step_seconds"]
        if entry["draft"] is not None:
            named[prefix + "draft_cost"] = entry["draft"]
        named |= {f"{prefix}verify_cost_{n}": cost for n, cost in entry["verify"].items()}
    return named


def _show(content: Mapping[str, Any]) -> None:
    summary = content["summary"]
    for columns, rows in tables(content["cells"]):
        print(report.table(columns, rows), end="\n\n")
    for entry in content["costs"]:
        print(f"{entry['model']}, {costs_sentence(entry)}")
    for sentence in content["verdicts"]:
        print(sentence)
    if "greedy_identical" in summary:
        print(greedy_sentence(summary))
        print(CAVEAT)
