"""Mean, spread and table by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextlat_dist.experiments.compare import compare, draw, summarise, table_of
from nextlat_dist.reporting.pictures import save_picture
from nextlat_dist.reporting.runs import over_runs
from nextlat_dist.reporting.tables import table

HEADINGS = {"task/accuracy": "accuracy", "training/loss": "loss"}
ROWS = [
    {"variant": "both", "seed": 0, "seconds": 1.0, "task/accuracy": 1.0, "training/loss": 4.0},
    {"variant": "neither", "seed": 0, "seconds": 1.0, "training/loss": 2.0},
    {"variant": "both", "seed": 1, "seconds": 1.0, "task/accuracy": 2.0, "training/loss": 4.0},
    {"variant": "both", "seed": 2, "seconds": 1.0, "task/accuracy": 6.0},
]


def test_spread_by_hand() -> None:
    found = over_runs([1.0, 2.0, 6.0])  # deviations -2, -1, 3: squares 14, over two
    assert (found.mean, found.lowest, found.highest, found.n) == (3.0, 1.0, 6.0, 3)
    assert found.deviation == pytest.approx(7**0.5, rel=1e-12)
    assert found.with_deviation() == "3.000 ± 2.646"
    assert (over_runs([2.0]).deviation, over_runs([2.0]).with_deviation()) == (None, "2.000")


def test_summary_and_table_by_hand() -> None:
    compared = compare(ROWS, list(HEADINGS))
    assert summarise(compared) == {
        "both/task/accuracy/mean": 3.0,
        "both/task/accuracy/deviation": pytest.approx(7**0.5),
        "both/task/accuracy/min": 1.0,
        "both/task/accuracy/max": 6.0,
        "both/task/accuracy/n": 3,
        "both/training/loss/mean": 4.0,
        "both/training/loss/deviation": 0.0,
        "both/training/loss/min": 4.0,
        "both/training/loss/max": 4.0,
        "both/training/loss/n": 2,
        "neither/training/loss/mean": 2.0,
        "neither/training/loss/min": 2.0,
        "neither/training/loss/max": 2.0,
        "neither/training/loss/n": 1,
    }
    lines = table(*table_of(compared, HEADINGS, ROWS)).splitlines()
    assert [line.split() for line in lines] == [
        ["variant", "seeds", "accuracy", "loss"],
        ["both", "3", "3.000", "±", "2.646", "4.000", "±", "0.000"],
        ["neither", "1", "–", "2.000"],
    ]


def test_picture_has_every_number_that_some_cell_has(tmp_path: Path) -> None:
    save_picture(draw(ROWS, {**HEADINGS, "task/nowhere": "nowhere"}), tmp_path / "new" / "ablations.png")
    assert (tmp_path / "new" / "ablations.png").read_bytes().startswith(b"\x89PNG")
