"""The task report: the table and the JSON, from the scores of every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nextlat_dist.evaluation.tasks.scores import Runs, Scores, Share
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.runs import OverRuns, over_runs
from nextlat_dist.reporting.tables import table
from nextlat_dist.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

COMMAND = "nextlat evaluate task"


@dataclass(frozen=True)
class NumberRow:
    """One number of one run."""

    export: str
    run: int
    number: str
    value: Share | float

    def to_json(self) -> dict[str, Any]:
        return {"export": self.export, "run": self.run, "number": self.number, **_described(self.value)}


@dataclass(frozen=True)
class CurveRow:
    """One point of one curve of one run."""

    export: str
    run: int
    curve: str
    position: int
    value: Share

    def to_json(self) -> dict[str, Any]:
        where = {"export": self.export, "run": self.run, "curve": self.curve, "position": self.position}
        return where | _described(self.value)


def task_report(
    options: Mapping[str, Any],
    task: Task,
    runs: Runs,
    documents: int,
    pictures: Mapping[str, Callable[[], Figure]],
    solved: tuple[str, float] | None = None,
) -> Report:
    """`solved`: see `TaskScorer`."""
    shares = solved_shares(runs, solved)
    summary = summarise(runs) | {"documents": documents}
    for name, share in shares.items():
        low, high = share.interval
        summary |= {f"{name}_solved_share": share.value, f"{name}_solved_low": low, f"{name}_solved_high": high}
    return Report(
        command=COMMAND,
        options=options,
        summary=summary,
        rows=rows_of(runs),
        text=_text(task, runs, documents, solved, shares),
        pictures=pictures,
    )


def solved_shares(runs: Runs, solved: tuple[str, float] | None) -> dict[str, Share]:
    """Of each name, how many of its runs solve the task; nothing where the number was not taken."""
    if solved is None:
        return {}
    number, least = solved
    return {
        name: Share.of(_value(own.numbers[number]) >= least for own in scores)
        for name, scores in runs.items()
        if number in scores[0].numbers
    }


def _value(number: Share | float) -> float:
    return number.value if isinstance(number, Share) else number


def pooled(scores: Sequence[Scores], name: str) -> OverRuns:
    """A number over the runs of one name; a single run of a share has Wilson's interval over documents."""
    numbers = [own.numbers[name] for own in scores]
    first = numbers[0]
    interval = first.interval if isinstance(first, Share) else None
    return over_runs(map(_value, numbers), interval)


def summarise(runs: Runs) -> dict[str, float]:
    """Flat: `nextlat_exact_greedy`; with several runs also `…_lowest` and `…_highest`; and `guess_exact_greedy`."""
    summary: dict[str, float] = {}
    for name, scores in runs.items():
        for number in scores[0].numbers:
            over = pooled(scores, number)
            summary[f"{name}_{number}"] = over.mean
            if over.n > 1:
                summary |= {f"{name}_{number}_lowest": over.lowest, f"{name}_{number}_highest": over.highest}
        summary |= {f"guess_{number}": guess for number, guess in scores[0].guesses.items()}
    return summary


def rows_of(runs: Runs) -> list[NumberRow | CurveRow]:
    """Every number and every point of every curve of every run."""
    rows: list[NumberRow | CurveRow] = []
    for name, scores in runs.items():
        for run, own in enumerate(scores):
            rows += [NumberRow(name, run, number, value) for number, value in own.numbers.items()]
            rows += [
                CurveRow(name, run, curve, position, share)
                for curve, points in own.curves.items()
                for position, share in enumerate(points.shares, start=points.first)
            ]
    return rows


def _described(value: Share | float) -> dict[str, Any]:
    if not isinstance(value, Share):
        return {"value": value}
    low, high = value.interval
    return {"value": value.value, "low": low, "high": high, "documents": value.total}


def _text(task: Task, runs: Runs, documents: int, solved: tuple[str, float] | None, shares: Mapping[str, Share]) -> str:
    """A line per number, a column per name; what guessing reaches in the last one."""
    names = list(runs)
    guesses = {number: guess for scores in runs.values() for number, guess in scores[0].guesses.items()}
    numbers = list(dict.fromkeys(number for scores in runs.values() for number in scores[0].numbers))
    lines = [
        {"number": number, "guess": guesses.get(number)}
        | {
            f"column{index}": pooled(runs[name], number).with_bounds() if number in runs[name][0].numbers else None
            for index, name in enumerate(names)
        }
        for number in numbers
    ]
    if solved is not None and shares:
        cells = {f"column{i}": _of_runs(shares[name]) if name in shares else None for i, name in enumerate(names)}
        lines.append({"number": f"runs with {solved[0]} ≥ {solved[1]:g}", "guess": None, **cells})
    columns = {task.name: "{number}"}
    for index, name in enumerate(names):
        several = f", {len(runs[name])} runs" if len(runs[name]) > 1 else ""
        columns[f"{name}{several}"] = f"{{column{index}}}"
    columns["guess"] = "{guess:.3f}"
    brackets = "in brackets: 95% interval over documents; over several runs: lowest and highest"
    return f"{table(columns, lines)}\n{documents} documents; {brackets}"


def _of_runs(share: Share) -> str:
    """`6 of 8 (0.41–0.93)`: with Wilson's interval over runs."""
    return "{} of {} ({:.2f}–{:.2f})".format(share.right, share.total, *share.interval)
