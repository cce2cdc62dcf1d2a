"""What adaptive drafting has to know, measured: how often drafts are accepted, and what drafting and verifying cost.

    calibrate(export: Path, prompts: list[Path], *, temperatures=(0.0, 0.6, 1.0), batch_sizes=(1, 4, 16, 64, 128),
              prompts_per_domain=8, skip=0, max_new_tokens=96, seed=0, …) -> dict

Acceptance comes from decoding the prompts with a long fixed draft length: of each drafted token, its position, how sure
the drafter was just before it was sampled, and whether it was accepted, given that all before it were. Costs come from
the decoding loop itself (`cycle_costs`). The result steers speed alone; it is specific to the machine and the dtype.

Command: `nextlat calibrate --export DIR --prompts FILE|DIR…`; writes `calibration.json` beside the drafter's weights.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nextlat_dist.calibration.cycle_costs import measure_cycle_costs
from nextlat_dist.calibration.logistic import fit, probability, reliability
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.draft_vocabulary import count_dataset, coverage, most_frequent
from nextlat_dist.huggingface.drafters.format import StoredDrafter
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import Cycle
from nextlat_dist.inference.loading import decoder_of
from nextlat_dist.inference.prompts import Prompt, load_prompts
from nextlat_dist.inference.speculative.calibration import CONFIDENCE_LIMIT, Acceptance, Calibration
from nextlat_dist.reporting import pictures, report

DRAFT_LENGTH = 10  # of the decoding that acceptance is measured on
DECODED_TOGETHER = 8
FEWEST_OBSERVATIONS = 20  # of a position with a share of its own
RELIABILITY_BINS = 8


@dataclass
class Observations:
    """Drafted tokens of one temperature whose predecessors were all accepted."""

    positions: list[int] = field(default_factory=list)  # 1, 2, …
    confidences: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)

    def note(self, cycle: Cycle) -> None:
        for confidences, kept in zip(cycle.confidences, cycle.accepted, strict=True):
            for position, confidence in enumerate(confidences[: kept + 1], start=1):
                self.positions.append(position)
                self.confidences.append(confidence)
                self.accepted.append(position <= kept)

    def features(self) -> np.ndarray:
        """1, logit(confidence), log(position): [observations, 3]."""
        confidence = np.clip(np.array(self.confidences), CONFIDENCE_LIMIT, 1 - CONFIDENCE_LIMIT)
        positions = np.array(self.positions, dtype=np.float64)
        return np.stack([np.ones_like(positions), np.log(confidence / (1 - confidence)), np.log(positions)], axis=1)

    def acceptance(self, temperature: float) -> Acceptance:
        """The shares by position, up to the first that was hardly ever reached, and the regression on confidence."""
        positions, accepted = np.array(self.positions), np.array(self.accepted, dtype=np.float64)
        by_position: list[float] = []
        for position in range(1, positions.max() + 1):
            here = positions == position
            if position > 1 and here.sum() < FEWEST_OBSERVATIONS:
                break
            by_position.append(float(accepted[here].mean()))
        return Acceptance(temperature, by_position, fit(self.features(), accepted).tolist())

    def reliability(self, acceptance: Acceptance) -> list[dict[str, Any]]:
        predicted = probability(np.array(acceptance.confidence), self.features())
        return reliability(predicted, np.array(self.accepted, dtype=np.float64), RELIABILITY_BINS)


def calibrate(
    export: Path,
    prompts: list[Path],
    *,
    temperatures: Sequence[float] = (0.0, 0.6, 1.0),
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 128),
    prompts_per_domain: int = 8,
    skip: int = 0,
    max_new_tokens: int = 96,
    seed: int = 0,
    draft_vocabulary: int | None = None,
    data: Path | None = None,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, write the calibration into the export, print tables, and return the content of the JSON.

    Args:
        temperatures: sampling temperatures to calibrate; decoding uses the nearest.
        batch_sizes: rows decoded together whose costs are measured; 1 is always added.
        skip: leave out the first prompts of each domain, for those who measure speed on them.
        max_new_tokens: per prompt and temperature.
        draft_vocabulary: first make the predictor draft from so many of the most frequent ids of the dataset `data`; 0:
            from all ids; None: as it is.
        json_path: where to write the measurements. picture_dir: where to write `calibration.png`.

    Raises:
        UserError: nothing to draft with, no prompts left, or an option out of range.
    """
    if not temperatures or not batch_sizes or min(batch_sizes) < 1 or max_new_tokens < 3 or skip < 0:
        raise UserError(
            f"temperatures is {list(temperatures)}, batch_sizes {list(batch_sizes)}, max_new_tokens {max_new_tokens} "
            f"and skip {skip}, but there must be a temperature, batch sizes ≥ 1, 3 new tokens and a skip ≥ 0; change "
            "the one that is wrong"
        )
    chosen = _choose(prompts, prompts_per_domain, skip)
    opened = open_export(export)
    directory = drafter_of(opened).directory
    vocabulary_share = None
    if draft_vocabulary is not None:
        vocabulary_share = change_draft_vocabulary(opened, draft_vocabulary, data)
    decoder = decoder_of(opened)
    encoded = [_encode(decoder, prompt) for prompt in chosen]
    observed = measure_acceptance(decoder, encoded, temperatures, max_new_tokens, seed, progress)
    costs = measure_cycle_costs(decoder, encoded, sorted({1, *batch_sizes}), seed, progress)
    acceptance = [seen.acceptance(temperature) for temperature, seen in observed.items()]
    calibration = Calibration(decoder.llama.device.type, costs, acceptance, _measured_on(decoder, len(chosen)))
    calibration.save(directory)

    rows = [
        {"temperature": entry.temperature} | group
        for entry in acceptance
        for group in observed[entry.temperature].reliability(entry)
    ]
    _print(calibration, observed, rows)
    options = {
        "temperatures": list(temperatures),
        "batch_sizes": list(batch_sizes),
        "prompts_per_domain": prompts_per_domain,
        "skip": skip,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    content = report.envelope("nextlat calibrate", options, _summary(calibration, rows, vocabulary_share), rows)
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        draw_picture(calibration, rows, picture_dir / "calibration.png")
    return content


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
    """`per_domain` prompts of every domain, behind its first `skip`."""
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
) -> dict[float, Observations]:
    """What became of every draft at each temperature; EOS is ignored, as in measurements of speed."""
    longest = decoder.drafter.longest if decoder.drafter else None
    length = min(DRAFT_LENGTH, longest or DRAFT_LENGTH)
    observed = {temperature: Observations() for temperature in temperatures}
    starts = range(0, len(prompts), DECODED_TOGETHER)
    shown = report.Progress("calibrate, acceptance", len(observed) * len(starts), progress)
    for start in starts:
        for temperature, seen in observed.items():
            generations = decoder.generate(
                prompts[start : start + DECODED_TOGETHER],
                max_new_tokens=max_new_tokens,
                draft_length=length,
                temperature=temperature,
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
    return report.machine() | {"dtype": dtype, "versions": versions, "prompts": prompts}


def _summary(
    calibration: Calibration, rows: list[dict[str, Any]], vocabulary_share: float | None
) -> dict[str, int | float]:
    summary: dict[str, int | float] = {}
    for size, line in calibration.costs.verify.items():
        summary[f"plain_cost_batch_{size}"] = line[1]
        summary[f"draft_cost_batch_{size}"] = calibration.costs.draft[size] / line[1]
        summary[f"first_draft_extra_cost_batch_{size}"] = calibration.costs.begin[size] / line[1]
        summary |= {f"verify_cost_{width}_batch_{size}": cost / line[1] for width, cost in line.items() if width > 1}
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


def _print(calibration: Calibration, observed: dict[float, Observations], rows: list[dict[str, Any]]) -> None:
    widths = sorted(next(iter(calibration.costs.verify.values())))
    lines = [
        {"size": size, "plain": line[1]}
        | {"first": calibration.costs.begin[size] / line[1], "draft": calibration.costs.draft[size] / line[1]}
        | {f"v{width}": line[width] / line[1] for width in widths}
        for size, line in calibration.costs.verify.items()
    ]
    columns = {"batch": "{size}", "plain step": "{plain:.2f}", "draft c": "{draft:.3f}", "first +": "{first:.3f}"}
    print("Costs: the plain step in units of that at batch 1, the others in plain steps of the same batch")
    print(report.table(columns | {f"v({width})": f"{{v{width}:.2f}}" for width in widths if width > 1}, lines))
    print("\nAcceptance by position, given that all before were accepted")
    for entry in calibration.acceptance:
        shares = " ".join(f"{share:.2f}" for share in entry.by_position)
        w0, w1, w2 = entry.confidence
        print(
            f"temperature {entry.temperature:g}: {shares}; logit P = {w0:.2f} + {w1:.2f} logit(confidence) "
            f"{w2:+.2f} log(position), from {len(observed[entry.temperature].positions)} drafts"
        )
    print("\nReliability of P(accept) given the confidence")
    columns = {
        "temperature": "{temperature:g}",
        "predicted": "{predicted:.3f}",
        "observed": "{observed:.3f}",
        "drafts": "{count}",
    }
    print(report.table(columns, rows))


def draw_picture(calibration: Calibration, rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance by position, and predicted against observed acceptance; a line per temperature."""
    figure, (by_position, reliable) = pictures.panels(2, "Calibration of adaptive drafting")
    reliable.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
    for color, entry in zip(pictures.COLORS * len(calibration.acceptance), calibration.acceptance, strict=False):
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3.5, "linewidth": 1.3}
        label = f"temperature {entry.temperature:g}"
        by_position.plot(range(1, len(entry.by_position) + 1), entry.by_position, label=label, **style)
        groups = [row for row in rows if row["temperature"] == entry.temperature]
        reliable.plot([row["predicted"] for row in groups], [row["observed"] for row in groups], label=label, **style)
    by_position.set(xlabel="position of the draft", ylabel="accepted, given all before", ylim=(0, 1.03))
    reliable.set(xlabel="predicted P(accept)", ylabel="observed share", xlim=(0, 1.03), ylim=(0, 1.03))
    reliable.legend(fontsize=8)
    pictures.save_picture(figure, path)
