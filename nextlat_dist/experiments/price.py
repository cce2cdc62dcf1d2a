"""The price of a drafter: the loss that a base gives up for tokens that are accepted, at equal tokens and at equal
seconds.

    nextlat experiments price --scale cpu --output runs/field --jobs 2 --json price.json --pictures DIR

The grid configs/experiments/price.yaml, run by `ablate` into OUTPUT/text (where `experiments field` trains GPT and
NextLat, too: what is finished is shared), then once more into OUTPUT/seconds with every run cut to the seconds that GPT
took: by the median seconds of a step in the first grid, a fit afterwards by the seconds that its steps took there.

`price_loss_WAY` (`…_low`, `…_high`)    validation loss over GPT's of the same seed: mean, Student's interval over seeds
`price_accepted_WAY`                    accepted of three drafted tokens per cycle at temperature 1
`price_accepted_greedy_WAY`             the same, greedily
`price_seconds_…_WAY`                   these at equal seconds

The ways: `joint` (NextLat), `tenth` (a tenth of its weights), `shadow` (trained apart from the base), `decay` (in the
decay of the learning rate alone), `posthoc` (fitted to GPT's base), `joint_refit` (NextLat's fitted once more).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nextlat_dist.config.shipped import shipped_root
from nextlat_dist.errors import UserError
from nextlat_dist.experiments.ablate import ablate
from nextlat_dist.experiments.cell import derived
from nextlat_dist.experiments.grid import Grid, GridCell, cells_of, read_grid
from nextlat_dist.files import EXPORT_REPORT_FILE, write_whole, writing
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.runs import over_runs
from nextlat_dist.reporting.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "nextlat experiments price"
PICTURE = "price.png"
TOKENS, SECONDS = "text", "seconds"  # folders of the two grids
EQUAL = {TOKENS: "equal tokens", SECONDS: "equal seconds"}
LOSS, STEP = "training/validation_next_token", "training/step_seconds"
GREEDY, SAMPLED = "accepted_tokens_per_cycle", "sampled_accepted_tokens_per_cycle"
DRAFTS, FITTED_DRAFTS, FITTED = "drafts", "fitted-drafts", "fitted"  # evaluations of the grid, and its derived export
GPT, STEP_SECONDS = "gpt", "step_seconds"
CUT_GRID, CUT_KEYS = "seconds.yaml", ("training.train_tokens", "schedule.decay_tokens", "objective.lambda_schedule")
COLUMNS = {
    "way": "{way}",
    "seeds": "{seeds}",
    "loss over GPT's": "{loss}",
    "accepted of 3, T = 1": "{sampled}",
    "greedy": "{greedy}",
    "s a step": "{step:.3f}",
    "share of tokens": "{share:.2f}",
}
Rows = Sequence[Mapping[str, Any]]
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, by degrees of freedom


@dataclass(frozen=True)
class Way:
    """A way to a drafter.

    Attributes:
        variant: of the grid, whose base it is.
        evaluation: of the grid, which counts what it accepts.
    """

    variant: str
    evaluation: str = DRAFTS

    @property
    def fitted(self) -> bool:
        return self.evaluation != DRAFTS


WAYS = {
    "joint": Way("nextlat"),
    "joint_refit": Way("nextlat", FITTED_DRAFTS),
    "tenth": Way("tenth"),
    "shadow": Way("shadow"),
    "decay": Way("decay"),
    "posthoc": Way("gpt", FITTED_DRAFTS),
}


def price(output: Path, *, seeds: Sequence[int] | None = None, jobs: int = 1, overrides: Sequence[str] = ()) -> Report:
    """Run what is left of both grids, and put the ways next to each other. Raises UserError as `ablate`."""
    path = grid_file()
    tokens = ablate(path, output / TOKENS, seeds=seeds, jobs=jobs, overrides=overrides)
    _complete(tokens)
    grid = read_grid(path)
    cells = cells_of(grid, grid.seeds if seeds is None else seeds, output / TOKENS, overrides)
    shares = shares_of(tokens.rows, cells[0].config.total_steps, _fit_seconds(grid, cells))
    with writing(output):
        write_whole(output / CUT_GRID, yaml.safe_dump(cut_grid(grid, output, cells, shares), sort_keys=False))
    say("the same at equal seconds", error=True)
    left = [one for one in overrides if one.partition("=")[0] not in CUT_KEYS]
    seconds = ablate(output / CUT_GRID, output / SECONDS, seeds=seeds, jobs=jobs, overrides=left)
    _complete(seconds)
    return report_of(tokens, seconds, shares)


def _complete(report: Report) -> None:
    if report.extra["failures"] or report.extra["missing"]:
        raise UserError(f"{report.remarks[-1]}; the same command resumes with what is finished")


def grid_file() -> Path:
    return shipped_root() / "configs" / "experiments" / "price.yaml"


def _fit_seconds(grid: Grid, cells: Sequence[GridCell]) -> dict[str, float]:
    """What the steps of the fit took, by variant: means over seeds."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell.variant in grid.variants_of(grid.exports[FITTED]):
            report = json.loads((derived(cell, FITTED) / EXPORT_REPORT_FILE).read_text())
            found.setdefault(cell.variant, []).append(report["fitted_drafter"]["seconds"])
    return {variant: statistics.fmean(values) for variant, values in found.items()}


def shares_of(rows: Sequence[Mapping[str, Any]], total_steps: int, fits: Mapping[str, float]) -> dict[str, float]:
    """Way → the share of the tokens that it may train on, its fit included, in the seconds of GPT's training.

    Args:
        rows: of the grid at equal tokens, all of `total_steps` steps.
        fits: seconds of a fit, by variant.

    Raises:
        UserError: no time is left to train in.
    """
    step = {
        name: statistics.fmean(row[STEP] for row in rows if row["variant"] == name)
        for name in {GPT, *(way.variant for way in WAYS.values())}
    }
    total = step[GPT] * total_steps
    shares = {}
    for name, way in WAYS.items():
        left = total - (fits[way.variant] if way.fitted else 0.0)
        if left <= 0:
            raise UserError(
                f"the fit of {name} takes {fits[way.variant]:.0f} s, GPT's whole training {total:.0f} s; raise "
                "training.train_tokens"
            )
        shares[name] = min(1.0, left / total * step[GPT] / step[way.variant])
    return shares


def cut_grid(grid: Grid, output: Path, cells: Sequence[GridCell], shares: Mapping[str, float]) -> dict[str, Any]:
    """The grid at equal seconds: a variant for each way, on the data of the first one.

    Args:
        cells: of `grid`, for what each variant's run is.
    """
    data = str((output / TOKENS / "data").resolve())
    configs = {cell.variant: cell.config for cell in cells}
    variants = {}
    for name, way in WAYS.items():
        config, share = configs[way.variant], shares[name]
        cut: dict[str, Any] = {
            # Whole steps, as a run counts them; the decay keeps its share of the run.
            "training.train_tokens": max(1, round(config.total_steps * share)) * config.tokens_per_step,
            "schedule.decay_tokens": round(config.schedule.decay_tokens * share),
        }
        schedule = config.objective.lambda_schedule
        if schedule:
            cut["objective.lambda_schedule"] = {
                key: [[round(at * share), value] for at, value in points] for key, points in schedule.items()
            }
        variants[name] = {**grid.variants[way.variant], **cut}
    fitted = [name for name, way in WAYS.items() if way.fitted]
    only = {DRAFTS: [name for name in WAYS if name not in fitted], FITTED_DRAFTS: fitted}
    changed = replace(
        grid,
        base=str(Path(grid.base).resolve()),
        data=[],
        then={},
        variants=variants,
        settings={key: _placed(value, data) for key, value in grid.settings.items()},
        exports={
            name: replace(one, arguments=_placed(one.arguments, data), only=fitted)
            for name, one in grid.exports.items()
        },
        evaluations={
            name: replace(one, arguments=_placed(one.arguments, data), only=only[name])
            for name, one in grid.evaluations.items()
        },
    )
    return asdict(changed)


def _placed(value: Any, data: str) -> Any:
    """With the first grid's data."""
    if isinstance(value, list):
        return [_placed(word, data) for word in value]
    return value.replace("{data}", data) if isinstance(value, str) else value


def report_of(tokens: Report, seconds: Report, shares: Mapping[str, float]) -> Report:
    """One page of both grids' reports."""
    gpt = {row["seed"]: row for row in tokens.rows if row["variant"] == GPT}
    rows = [
        {"equal": TOKENS, "way": GPT, "seed": seed, "loss": row[LOSS], STEP_SECONDS: row[STEP]}
        for seed, row in gpt.items()
    ]
    for equal, report in ((TOKENS, tokens), (SECONDS, seconds)):
        for name, way in WAYS.items():
            of_way = way.variant if equal == TOKENS else name
            rows += [
                {
                    "equal": equal,
                    "way": name,
                    "seed": row["seed"],
                    "loss": row[LOSS],
                    "loss_over_gpt": row[LOSS] - gpt[row["seed"]][LOSS],
                    "accepted_greedy": row[f"{way.evaluation}/{GREEDY}"],
                    "accepted": row[f"{way.evaluation}/{SAMPLED}"],
                    STEP_SECONDS: row[STEP],
                    "share_of_tokens": 1.0 if equal == TOKENS else shares[name],
                }
                for row in report.rows
                if row["variant"] == of_way
            ]
    return Report(
        command=COMMAND,
        options={"tokens": dict(tokens.options), "seconds": dict(seconds.options)},
        summary=_summary(rows),
        rows=rows,
        extra={
            "failures": [],
            "missing": {},
            "ways": {name: [way.variant, way.evaluation] for name, way in WAYS.items()},
        },
        text=_text(rows),
        pictures={PICTURE: partial(draw, rows)},
    )


def _of(rows: Rows, equal: str, way: str, number: str) -> list[float]:
    return [row[number] for row in rows if row["equal"] == equal and row["way"] == way and number in row]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's, of 95%, for the mean; of a single value from minus to plus infinity."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    quantile = T_975[min(len(values) - 1, len(T_975) - 1)]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _summary(rows: Rows) -> dict[str, float]:
    summary = {}
    for equal, middle in ((TOKENS, ""), (SECONDS, "seconds_")):
        for way in WAYS:
            losses = _of(rows, equal, way, "loss_over_gpt")
            low, high = interval(losses)
            summary[f"price_{middle}loss_{way}"] = statistics.fmean(losses)
            if len(losses) > 1:
                summary |= {f"price_{middle}loss_{way}_low": low, f"price_{middle}loss_{way}_high": high}
            summary[f"price_{middle}accepted_{way}"] = statistics.fmean(_of(rows, equal, way, "accepted"))
            summary[f"price_{middle}accepted_greedy_{way}"] = statistics.fmean(_of(rows, equal, way, "accepted_greedy"))
    return summary


def _text(rows: Rows) -> str:
    gpt = statistics.fmean(_of(rows, TOKENS, GPT, "loss"))
    texts = [f"GPT: validation loss {gpt:.3f}, {statistics.fmean(_of(rows, TOKENS, GPT, STEP_SECONDS)):.3f} s a step"]
    for equal, title in EQUAL.items():
        lines = []
        for way in WAYS:
            losses = _of(rows, equal, way, "loss_over_gpt")
            low, high = interval(losses)
            lines.append(
                {
                    "way": way,
                    "seeds": len(losses),
                    "loss": f"{statistics.fmean(losses):+.3f}"
                    + (f" ({low:+.3f} to {high:+.3f})" if len(losses) > 1 else ""),
                    "greedy": over_runs(_of(rows, equal, way, "accepted_greedy")).with_deviation(),
                    "sampled": over_runs(_of(rows, equal, way, "accepted")).with_deviation(),
                    "step": statistics.fmean(_of(rows, equal, way, STEP_SECONDS)),
                    "share": statistics.fmean(_of(rows, equal, way, "share_of_tokens")),
                }
            )
        texts.append(f"{title}\n{table(COLUMNS, lines)}")
    texts.append(
        "loss over GPT's of the same seed, with Student's interval of 95%; accepted: mean ± standard deviation"
    )
    return "\n\n".join(texts)


def draw(rows: Rows) -> Figure:
    """Loss given up against tokens accepted: a dot for every seed, a cross at their mean."""
    from nextlat_dist.reporting import pictures

    title = "What a drafter costs the base: each dot a seed, crosses their means"
    figure, axes = pictures.grid(1, len(EQUAL), title)
    for axis, (equal, heading) in zip(axes[0], EQUAL.items(), strict=True):
        axis.axhline(0, color="gray", linewidth=0.8)
        for index, way in enumerate(WAYS):
            color = pictures.COLORS[index % len(pictures.COLORS)]
            x, y = _of(rows, equal, way, "accepted"), _of(rows, equal, way, "loss_over_gpt")
            axis.plot(x, y, "o", color=color, alpha=0.5, markersize=5)
            axis.plot(statistics.fmean(x), statistics.fmean(y), "X", color=color, markersize=10, label=way)
        axis.set(title=heading, xlabel="accepted of 3 drafted tokens, T = 1", ylabel="validation loss over GPT's")
        axis.legend(fontsize=8)
    return figure
