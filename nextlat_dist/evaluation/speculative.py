"""What self-speculative decoding buys on given prompts: speed, acceptance, and whether it is lossless.

    evaluate_speculative(export: Path, prompts: list[Path], *, draft_lengths=(0, …, 8), report_draft_length=3,
                         temperatures=(0.0, 1.0), max_new_tokens=128, prompts_per_domain=8, repeats=1, seed=0,
                         json_path=None, picture_dir=None, progress=True) -> dict

The baseline is draft length 0 of the same code. All draft lengths take turns on every prompt within one run, in an
order that rotates; a speedup is the median over the prompts of the ratio to the baseline on the same prompt, so a slow
spell of the machine moves neither side. EOS is ignored, so that every side writes equally many tokens.

Command: `nextlat evaluate speculative --export DIR --prompts FILE|DIR… --json FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from nextlat_dist import report
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation import pictures
from nextlat_dist.evaluation.costs import Costs, measure_costs
from nextlat_dist.evaluation.prompts import Prompt, load_prompts
from nextlat_dist.inference.decoder import Decoder, Generation, load

ALL = "all"
REPETITION_ORDER = 4
BOOTSTRAP_SAMPLES = 1000
SUMMARY_FIELDS = (
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_with_prefill",
    "accepted_tokens_per_cycle",
    "tokens_per_cycle",
)
CAVEAT = (
    "The greedy text of a small model falls into loops, and a loop is easy to draft: the greedy numbers flatter "
    "acceptance. Read them together with the share of repeated 4-grams and with the numbers at temperature 1."
)
COLUMNS = {
    "domain": "{domain}",
    "temperature": "{temperature:g}",
    "draft length": "{draft_length}",
    "tokens/s": "{tokens_per_second:.0f}",
    "speedup": "{speedup:.2f}",
    "(95%)": "{speedup_low:.2f}–{speedup_high:.2f}",
    "with prefill": "{speedup_with_prefill:.2f}",
    "accepted/cycle": "{accepted_tokens_per_cycle:.2f}",
    "tokens/cycle": "{tokens_per_cycle:.2f}",
    "greedy differing": "{greedy_differing}",
    "repeated 4-grams": "{repeated_4gram_share:.2f}",
}


@dataclass(frozen=True)
class _Options:
    draft_lengths: tuple[int, ...]  # sorted, 0 first
    report_draft_length: int
    temperatures: tuple[float, ...]
    max_new_tokens: int
    prompts_per_domain: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        if self.draft_lengths[0] < 0:
            raise UserError(f"a draft length is {self.draft_lengths[0]}, but must be ≥ 0; change draft_lengths")
        if self.repeats < 1 or self.max_new_tokens < 2 or not self.temperatures:
            raise UserError(
                f"repeats is {self.repeats}, max_new_tokens {self.max_new_tokens} and temperatures has "
                f"{len(self.temperatures)} entries, but there must be at least 1 repeat, 2 new tokens (the prefill "
                "writes the first) and 1 temperature; change the one that is lower"
            )


@dataclass
class _Runs:
    """All generations of one (domain, temperature, draft length)."""

    generations: list[Generation] = field(default_factory=list)
    differing: int = 0

    def rates(self, prefill: bool = False) -> np.ndarray:
        """Tokens per second of each generation; the first token belongs to the prefill, as does its time."""
        if prefill:
            return np.array([len(g.token_ids) / (g.prefill_seconds + g.decode_seconds) for g in self.generations])
        return np.array([(len(g.token_ids) - 1) / g.decode_seconds for g in self.generations])


def evaluate_speculative(
    export: Path,
    prompts: list[Path],
    *,
    draft_lengths: Sequence[int] = tuple(range(9)),
    report_draft_length: int = 3,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    prompts_per_domain: int = 8,
    repeats: int = 1,
    seed: int = 0,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, print the table, write JSON and pictures where asked, and return the content of the JSON.

    Args:
        export: a directory written by `nextlat export`, with a latent predictor.
        prompts: prompt files or folders, see `evaluation.prompts`.
        draft_lengths: tokens drafted per cycle; 0 and `report_draft_length` are always added.
        report_draft_length: the draft length that the summary is about.
        repeats: runs per prompt, temperature and draft length; those at temperature > 0 use further seeds.

    Raises:
        UserError: no predictor, bad prompts, options out of range, or a prompt that does not fit into the context.
    """
    options = _Options(
        tuple(sorted({0, report_draft_length, *draft_lengths})),
        report_draft_length,
        tuple(temperatures),
        max_new_tokens,
        prompts_per_domain,
        repeats,
        seed,
    )
    chosen = load_prompts(prompts, prompts_per_domain)
    decoder = load(export)
    encoded = [_encode(decoder, prompt, max_new_tokens) for prompt in chosen]
    runs, differences = _measure(decoder, chosen, encoded, options, progress)
    rows = _rows(runs, options)
    costs = measure_costs(decoder, encoded[0], list(options.draft_lengths))
    summary = _summary(rows, costs, len(chosen), report_draft_length, differences)
    dtype = str(decoder.llama.embedding.dtype).removeprefix("torch.")
    content = report.envelope("nextlat evaluate speculative", asdict(options) | {"dtype": dtype}, summary, rows)
    content |= {"greedy_differences": differences, "costs": costs.to_json(), "caveat": CAVEAT}
    print(report.table(COLUMNS, rows))
    print(costs.sentence())
    if 0 in temperatures:
        print(CAVEAT)
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        draw_pictures(rows, picture_dir)
    return content


def _measure(
    decoder: Decoder, prompts: list[Prompt], encoded: list[list[int]], options: _Options, progress: bool
) -> tuple[dict[tuple[str, float, int], _Runs], list[dict[str, Any]]]:
    """All generations by (domain, temperature, draft length), and the greedy ones that differ from their baseline."""
    runs: dict[tuple[str, float, int], _Runs] = {}
    differences: list[dict[str, Any]] = []
    lengths = list(options.draft_lengths)
    for length in lengths:  # warm-up: allocations, kernel caches
        decoder.generate(encoded[:1], max_new_tokens=length + 2, draft_length=length, ignore_eos=True)
    turns = [
        (prompt, ids, temperature, options.seed + index * options.repeats + repeat)
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
        for temperature in options.temperatures
        for repeat in range(options.repeats)
    ]
    shown = report.Progress("evaluate speculative", len(turns), progress)
    for turn, (prompt, ids, temperature, seed) in enumerate(turns):
        results: dict[int, Generation] = {}
        first = turn % len(lengths)
        for length in lengths[first:] + lengths[:first]:
            results[length] = decoder.generate(
                [ids],
                max_new_tokens=options.max_new_tokens,
                draft_length=length,
                temperature=temperature,
                seed=seed,
                ignore_eos=True,
            )[0]
        expected = results[0].token_ids
        for length, generation in results.items():
            cell = runs.setdefault((prompt.domain, temperature, length), _Runs())
            cell.generations.append(generation)
            if temperature == 0 and generation.token_ids != expected:
                cell.differing += 1
                where = {"domain": prompt.domain, "prompt": prompt.name, "draft_length": length}
                differences.append(where | first_difference(decoder, ids, expected, generation.token_ids))
        shown.add(sum(len(generation.token_ids) for generation in results.values()))
    return runs, differences


def first_difference(
    decoder: Decoder, prompt_ids: list[int], expected: list[int], actual: list[int]
) -> dict[str, int | float]:
    """Where two greedy continuations part, and how far the base model's logits of the two tokens lie apart there.

    A gap at the level of rounding is a near tie that two orders of the same sum settled differently; a larger one is
    an error.
    """
    position = next(i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b)
    tokens = torch.tensor([prompt_ids + expected[:position]], device=decoder.llama.embedding.device)
    with torch.inference_mode():
        logits = decoder.llama.logits(decoder.llama.prefill(tokens, decoder.llama.new_cache(1, tokens.shape[1])))[0]
    gap = float((logits[expected[position]] - logits[actual[position]]).abs())
    return {"position": position, "logit_gap": gap}


def repeated_share(token_ids: list[int]) -> float:
    """The share of n-grams (n = REPETITION_ORDER) that occurred before in the same continuation."""
    grams = [tuple(token_ids[i : i + REPETITION_ORDER]) for i in range(len(token_ids) - REPETITION_ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _encode(decoder: Decoder, prompt: Prompt, max_new_tokens: int) -> list[int]:
    ids = decoder.encode(prompt.text)
    context = decoder.llama.config.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        raise UserError(
            f"prompt {prompt.name} of {prompt.domain} has {len(ids)} tokens, and with max_new_tokens {max_new_tokens} "
            f"it exceeds the model's context of {context}; shorten the prompt or lower max_new_tokens"
        )
    return ids


def _rows(runs: dict[tuple[str, float, int], _Runs], options: _Options) -> list[dict[str, Any]]:
    """One row per domain, temperature and draft length, and then the same over all domains."""
    domains = list(dict.fromkeys(domain for domain, _, _ in runs))
    for temperature in options.temperatures:
        for length in options.draft_lengths:
            parts = [runs[domain, temperature, length] for domain in domains]
            generations = [generation for part in parts for generation in part.generations]
            runs[ALL, temperature, length] = _Runs(generations, sum(part.differing for part in parts))
    return [
        _row((domain, temperature, length), runs[domain, temperature, length], runs[domain, temperature, 0])
        for domain in (*domains, ALL)
        for temperature in options.temperatures
        for length in options.draft_lengths
    ]


def _row(key: tuple[str, float, int], runs: _Runs, baseline: _Runs) -> dict[str, Any]:
    domain, temperature, length = key
    generations = runs.generations
    cycles = sum(g.cycles for g in generations)
    ratios = runs.rates() / baseline.rates()
    low, high = _interval_of_median(ratios)
    drafted = [sum(g.drafted_by_position[i] for g in generations) for i in range(length)]
    accepted = [sum(g.accepted_by_position[i] for g in generations) for i in range(length)]
    return {
        "domain": domain,
        "temperature": temperature,
        "draft_length": length,
        "generations": len(generations),
        "tokens": sum(len(g.token_ids) for g in generations),
        "tokens_per_second": float(np.median(runs.rates())),
        "speedup": float(np.median(ratios)),
        "speedup_low": low,
        "speedup_high": high,
        "speedup_with_prefill": float(np.median(runs.rates(prefill=True) / baseline.rates(prefill=True))),
        "cycles": cycles,
        "accepted_tokens_per_cycle": sum(accepted) / cycles,
        "tokens_per_cycle": sum(len(g.token_ids) - 1 for g in generations) / cycles,
        # Of the cycles that drafted so far, the share that accepted this position too.
        "acceptance_by_position": [a / d for a, d in zip(accepted, drafted, strict=True) if d],
        "greedy_differing": runs.differing if temperature == 0 else None,
        "repeated_4gram_share": sum(repeated_share(g.token_ids) for g in generations) / len(generations),
    }


def _interval_of_median(values: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    samples = np.random.default_rng(0).choice(values, (BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.quantile(np.median(samples, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _summary(
    rows: list[dict[str, Any]], costs: Costs, prompts: int, length: int, differences: list[dict[str, Any]]
) -> dict[str, Any]:
    """Flat numbers at the reported draft length: greedy by plain name, the first other temperature as `sampled_…`."""
    summary: dict[str, Any] = {"draft_length": length, "prompts": prompts, **costs.summary()}
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    sampled = next((t for t in temperatures if t > 0), None)
    for row in rows:
        if row["draft_length"] not in (0, length) or row["temperature"] not in (0, sampled):
            continue
        prefix = ("" if row["domain"] == ALL else row["domain"] + "_") + ("sampled_" if row["temperature"] else "")
        if row["draft_length"] == 0:
            summary[prefix + "baseline_tokens_per_second"] = row["tokens_per_second"]
            summary[prefix + "repeated_4gram_share"] = row["repeated_4gram_share"]
        if row["draft_length"] == length:
            summary |= {prefix + name: row[name] for name in SUMMARY_FIELDS}
    if 0 in temperatures:
        summary["greedy_identical"] = not differences
        summary["greedy_differences"] = len(differences)
        summary["greedy_largest_logit_gap"] = max((d["logit_gap"] for d in differences), default=0.0)
    return summary


def draw_pictures(rows: list[dict[str, Any]], directory: Path) -> None:
    """`acceptance_by_position.png` and `speedup_by_draft_length.png`: a panel per temperature, a line per domain."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    longest = max(row["draft_length"] for row in rows)
    acceptance, acceptance_axes = pictures.panels(
        len(temperatures), f"Accepted drafts by position, draft length {longest}"
    )
    speed, speed_axes = pictures.panels(len(temperatures), "Decoding speedup over draft length 0")
    for temperature, acceptance_axis, speed_axis in zip(temperatures, acceptance_axes, speed_axes, strict=True):
        for index, domain in enumerate(domains):
            color = "black" if domain == ALL else pictures.COLORS[index % len(pictures.COLORS)]
            style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3.5, "label": domain}
            style["linewidth"] = 2.2 if domain == ALL else 1.3
            own = [row for row in rows if (row["domain"], row["temperature"]) == (domain, temperature)]
            shares = next(row["acceptance_by_position"] for row in own if row["draft_length"] == longest)
            acceptance_axis.plot(range(1, len(shares) + 1), shares, **style)
            lengths = [row["draft_length"] for row in own]
            speed_axis.plot(lengths, [row["speedup"] for row in own], **style)
            if domain == ALL:
                band = ([row["speedup_low"] for row in own], [row["speedup_high"] for row in own])
                speed_axis.fill_between(lengths, *band, color=color, alpha=0.15, linewidth=0)
        name = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        acceptance_axis.set(title=name, xlabel="draft position", ylabel="share of cycles that accept it", ylim=(0, 1))
        speed_axis.axhline(1.0, color="black", linewidth=0.8)
        speed_axis.set(title=name, xlabel="draft length (tokens)", ylabel="speedup", ylim=(0, None))
        for axis in (acceptance_axis, speed_axis):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(frameon=False)
    pictures.save_picture(acceptance, directory / "acceptance_by_position.png")
    pictures.save_picture(speed, directory / "speedup_by_draft_length.png")
