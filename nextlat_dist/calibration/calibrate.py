"""Measures what adaptive drafting has to know: how often drafts are accepted, what drafting and verifying cost.

    calibrate(export: Path, prompts: list[Path], *, temperatures=(0.0, 0.6, 1.0), top_k=0, top_p=1.0,
              batch_sizes=(1, 4, 16, 64, 128), prompts_per_domain=8, skip=0, max_new_tokens=96, seed=0, …) -> Report

Acceptance comes from decoding the prompts with a long fixed draft length: of each drafted token, its position, the
confidence of the drafter just before it was sampled, and whether it was accepted, given that all before it were. Costs
come from the decoding loop itself (`cycle_costs`). The result steers speed alone; it is specific to the machine and the
dtype.

Command: `nextlat calibrate --export DIR --prompts FILE|DIR…`; writes `calibration.json` next to the drafter's weights.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nextlat_dist.calibration.cycle_costs import measure_cycle_costs
from nextlat_dist.calibration.observations import Observations
from nextlat_dist.calibration.page import draw_picture, tables
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.draft_vocabulary import count_dataset, coverage, most_frequent
from nextlat_dist.huggingface.drafters.format import StoredDrafter
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.loading import decoder_of
from nextlat_dist.inference.prompts import Prompt, load_prompts
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.calibration import Calibration
from nextlat_dist.reporting.console import Progress
from nextlat_dist.reporting.report import Report, machine

DRAFT_LENGTH = 10  # of the decoding that acceptance is measured on
DECODED_TOGETHER = 8


def calibrate(
    export: Path,
    prompts: list[Path],
    *,
    temperatures: Sequence[float] = (0.0, 0.6, 1.0),
    top_k: int = 0,
    top_p: float = 1.0,
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 128),
    prompts_per_domain: int = 8,
    skip: int = 0,
    max_new_tokens: int = 96,
    seed: int = 0,
    draft_vocabulary: int | None = None,
    data: Path | None = None,
    progress: bool = True,
) -> Report:
    """Measure, write the calibration into the export, and return the report.

    Args:
        temperatures: sampling temperatures to calibrate; decoding uses the nearest.
        top_k, top_p: of the temperatures above 0; those that decoding will use.
        batch_sizes: rows decoded together whose costs are measured; 1 is always added.
        skip: leave out the first prompts of each domain, for those who measure speed on them.
        max_new_tokens: per prompt and temperature.
        draft_vocabulary: first make the predictor draft from so many of the most frequent ids of the dataset `data`; 0:
            from all ids; None: as it is.

    Raises:
        UserError: nothing to draft with, no prompts left, or an option out of range.
    """
    if not temperatures or not batch_sizes or min(batch_sizes) < 1 or max_new_tokens < 3 or skip < 0:
        raise UserError(
            f"temperatures is {list(temperatures)}, batch_sizes {list(batch_sizes)}, max_new_tokens {max_new_tokens} "
            f"and skip {skip}, but there must be a temperature, batch sizes ≥ 1, 3 new tokens and a skip ≥ 0; change "
            "the one that is wrong"
        )
    samplings = {temperature: Sampling(temperature, top_k, top_p) for temperature in temperatures}
    chosen = _choose(prompts, prompts_per_domain, skip)
    opened = open_export(export)
    directory = drafter_of(opened).directory
    vocabulary_share = None
    if draft_vocabulary is not None:
        vocabulary_share = change_draft_vocabulary(opened, draft_vocabulary, data)
    decoder = decoder_of(opened)
    encoded = [_encode(decoder, prompt) for prompt in chosen]
    observed = measure_acceptance(decoder, encoded, temperatures, max_new_tokens, seed, progress, top_k, top_p)
    sizes = sorted({1, *batch_sizes})
    by_kind = {
        sampling.greedy: sampling
        for _, sampling in sorted(samplings.items())  # of several temperatures the highest
    }
    costs = {
        greedy: measure_cycle_costs(decoder, encoded, sizes, seed, progress, sampling)
        for greedy, sampling in by_kind.items()
    }
    acceptance = [
        seen.acceptance(temperature, *((top_k, top_p) if temperature else ())) for temperature, seen in observed.items()
    ]
    calibration = Calibration(
        decoder.llama.device.type,
        costs.get(True) or costs[False],
        acceptance,
        _measured_on(decoder, len(chosen)),
        costs[False] if len(costs) == 2 else None,
    )
    calibration.save(directory)

    rows = [
        {"temperature": entry.temperature} | group
        for entry in acceptance
        for group in observed[entry.temperature].reliability(entry)
    ]
    options = {
        "temperatures": list(temperatures),
        "top_k": top_k,
        "top_p": top_p,
        "batch_sizes": list(batch_sizes),
        "prompts_per_domain": prompts_per_domain,
        "skip": skip,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    return Report(
        "nextlat calibrate",
        options,
        _summary(calibration, rows, vocabulary_share),
        rows,
        text=tables(calibration, observed, rows),
        pictures={"calibration.png": partial(draw_picture, calibration, rows)},
    )


def change_draft_vocabulary(opened: OpenedExport, size: int, data: Path | None) -> float:
    """Make the drafter of an export draft from the `size` most frequent ids of the dataset `data` (0: from all ids);
    returns the share of the data's tokens that they are.
    """
    if not drafter_of(opened).kind.draft_vocabulary:
        raise UserError(
            f"draft_vocabulary is {size}, but {opened.path} has no latent predictor; leave --draft-vocabulary out"
        )
    if size == 0:
        opened.set_draft_vocabulary(None)
        return 1.0
    if data is None:
        raise UserError(f"draft_vocabulary is {size}, but there is no dataset to count ids in; name one with --data")
    counted = count_dataset(data, opened.config.vocab_size)
    ids = most_frequent(counted, size)
    opened.set_draft_vocabulary(ids)
    return coverage(counted, ids)


def drafter_of(opened: OpenedExport) -> StoredDrafter:
    """What drafts in an export, and where it keeps its calibration."""
    if opened.drafter is None:
        raise UserError(
            f"{opened.path} has nothing to draft with, so there is nothing to calibrate; export a run trained with "
            "objective.name nextlat or mtp"
        )
    return opened.drafter


def _choose(paths: list[Path], per_domain: int, skip: int) -> list[Prompt]:
    """`per_domain` prompts of every domain, after its first `skip`."""
    load_prompts(paths, per_domain)  # refuses what is no number of prompts
    domains: dict[str, list[Prompt]] = {}
    for prompt in load_prompts(paths, skip + per_domain):
        domains.setdefault(prompt.domain, []).append(prompt)
    for domain, prompts in domains.items():
        if len(prompts) <= skip:
            raise UserError(
                f"domain {domain} has {len(prompts)} prompts and skip is {skip}, which leaves none to calibrate on; "
                "lower --skip or add prompts"
            )
    return [prompt for prompts in domains.values() for prompt in prompts[skip:]]


def _encode(decoder: Decoder, prompt: Prompt) -> list[int]:
    """Token ids; the beginning of a prompt that would fill more than half of the context is left out."""
    return decoder.encode(prompt.text)[-decoder.llama.config.max_position_embeddings // 2 :]


def measure_acceptance(
    decoder: Decoder,
    prompts: list[list[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    progress: bool,
    top_k: int = 0,
    top_p: float = 1.0,
) -> dict[float, Observations]:
    """What became of every draft at each temperature; EOS is ignored, as in measurements of speed."""
    longest = decoder.drafter.longest if decoder.drafter else None
    length = min(DRAFT_LENGTH, longest or DRAFT_LENGTH)
    observed = {temperature: Observations() for temperature in temperatures}
    starts = range(0, len(prompts), DECODED_TOGETHER)
    shown = Progress("calibrate, acceptance", len(observed) * len(starts), progress)
    for start in starts:
        for temperature, seen in observed.items():
            generations = decoder.generate(
                prompts[start : start + DECODED_TOGETHER],
                max_new_tokens=max_new_tokens,
                draft_length=length,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed + start,
                ignore_eos=True,
                on_cycle=seen.note,
            )
            shown.add(sum(len(generation.token_ids) for generation in generations))
    return observed


def _measured_on(decoder: Decoder, prompts: int) -> dict[str, Any]:
    """What the numbers depend on: no date, host or path, so that an export can be published."""
    dtype = str(decoder.llama.embedding.dtype).removeprefix("torch.")
    versions = {package: importlib.metadata.version(package) for package in ("nextlat-dist", "torch")}
    return machine() | {"dtype": dtype, "versions": versions, "prompts": prompts}


def _summary(
    calibration: Calibration, rows: list[dict[str, Any]], vocabulary_share: float | None
) -> dict[str, int | float]:
    summary: dict[str, int | float] = {}
    for size, line in calibration.costs.verify.items():
        summary[f"plain_cost_batch_{size}"] = line[1]
        summary[f"draft_cost_batch_{size}"] = calibration.costs.draft[size] / line[1]
        summary[f"first_draft_extra_cost_batch_{size}"] = calibration.costs.begin[size] / line[1]
        summary |= {f"verify_cost_{width}_batch_{size}": cost / line[1] for width, cost in line.items() if width > 1}
    if calibration.sampled_costs is not None:
        for size, line in calibration.sampled_costs.verify.items():
            summary[f"sampled_draft_cost_batch_{size}"] = calibration.sampled_costs.draft[size] / line[1]
            summary |= {f"sampled_verify_cost_{n}_batch_{size}": cost / line[1] for n, cost in line.items() if n > 1}
    for entry in calibration.acceptance:
        summary[f"accepted_share_first_temperature_{entry.temperature:g}"] = entry.by_position[0]
        gaps = [
            abs(row["predicted"] - row["observed"]) * row["count"]
            for row in rows
            if row["temperature"] == entry.temperature
        ]
        count = sum(row["count"] for row in rows if row["temperature"] == entry.temperature)
        summary[f"calibration_error_temperature_{entry.temperature:g}"] = sum(gaps) / count
    if vocabulary_share is not None:
        summary["draft_vocabulary_coverage"] = vocabulary_share
    return summary
