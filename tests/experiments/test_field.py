"""The field on one page, from reports of grids; test_ablate has a grid from its cells to its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.experiments import field
from nextlat_dist.reporting.report import Report

LOSS, ACCEPTED = "training/validation_next_token", "drafts/accepted_tokens_per_cycle"
SOLVED_SUMS, RNN = "answers/run_solved_greedy", "products/run_latent_rnn_2x"
PARTS = (field.TEXT, field.PATH_STAR, field.COUNTDOWN, field.TRACKING)
HEADINGS = {
    field.TEXT: {LOSS: "validation loss", ACCEPTED: "accepted of 3, greedy"},
    field.PATH_STAR: {"paths/run_exact_greedy": "right"},
    field.COUNTDOWN: {SOLVED_SUMS: "solved"},
    field.TRACKING: {RNN: "latent RNN"},
}
ROWS = {
    field.TEXT: [
        {"variant": "gpt", "seed": 0, "seconds": 1, LOSS: 3.0},
        {"variant": "nextlat", "seed": 0, "seconds": 1, LOSS: 3.5, ACCEPTED: 1.0},
        {"variant": "nextlat", "seed": 1, "seconds": 1, LOSS: 3.0, ACCEPTED: 2.0},
    ],
    field.PATH_STAR: [{"variant": "nextlat", "seed": 0, "seconds": 1, "paths/run_exact_greedy": 1.0}],
    field.COUNTDOWN: [{"variant": "gpt", "seed": 0, "seconds": 1, SOLVED_SUMS: 0.25}],
    field.TRACKING: [{"variant": "nextlat", "seed": 0, "seconds": 1, RNN: 0.75}],
}
SOLVED = {"nextlat_solved_share": 1.0, "nextlat_solved_low": 0.2, "nextlat_solved_high": 1.0, "documents": 9}


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ablate` was asked for; its reports are those above."""
    asked = []

    def ablate(config: Path, output: Path, **given: Any) -> Report:
        part = output.name
        assert config.is_file()
        asked.append({"part": part, "config": config.name, **given})
        output.mkdir(parents=True)
        if part == field.PATH_STAR:
            (output / "report.json").write_text(json.dumps({"summary": SOLVED}))
        extra = {"headings": HEADINGS[part], "failures": [], "missing": {}}
        return Report("nextlat ablate", {}, {}, ROWS[part], extra=extra, remarks=["a remark"])

    monkeypatch.setattr(field, "ablate", ablate)
    return asked


def test_one_page_of_all_parts(grids: list[dict[str, Any]], tmp_path: Path) -> None:
    report = field.field("cpu", tmp_path / "out", seeds=[0, 1], jobs=2, overrides=["training.train_tokens=9"])
    how = {"seeds": [0, 1], "jobs": 2, "overrides": ["training.train_tokens=9"]}
    assert grids == [{"part": part, "config": f"{part}_field.yaml", **how} for part in PARTS]
    summary = dict(report.summary)
    parameters = {name: summary.pop(f"parameters_{name}") for name in ("gpt", "nextlat")}
    assert parameters["nextlat"] > parameters["gpt"] > 3_000_000
    assert summary == {
        **{"loss_gpt": 3.0, "loss_nextlat": 3.25, "accepted_nextlat": 1.5},
        **{"countdown_gpt": 0.25, "tracking_rnn_longer_nextlat": 0.75},
        **{"solved_share_nextlat": 1.0, "solved_share_nextlat_low": 0.2, "solved_share_nextlat_high": 1.0},
    }
    assert [(row["part"], row["variant"]) for row in report.rows] == [
        (part, row["variant"]) for part in PARTS for row in ROWS[part]
    ]
    lines = [" ".join(line.split()) for line in report.text.splitlines()]
    assert f"nextlat 2 3.250 ± 0.354 1.500 ± 0.707 {parameters['nextlat']:,}" in lines
    assert "nextlat 1 1.000 1.00 (0.20–1.00)" in lines
    assert not any(line.startswith("gpt 0") for line in lines), "it has no run of Path-Star"
    assert report.remarks == [f"{part}: a remark" for part in PARTS]
    (axes,) = ([axis.get_title() for axis in figure().axes][:5] for figure in report.pictures.values())
    assert axes == [
        *("text: validation loss", "text: accepted of 3, greedy", "path_star: right"),
        *("countdown: solved", "tracking: latent RNN"),
    ]


def test_a_part_alone(grids: list[dict[str, Any]], tmp_path: Path) -> None:
    report = field.field("cpu", tmp_path / "out", parts=[field.PATH_STAR])
    assert [asked["part"] for asked in grids] == [field.PATH_STAR]
    assert not any(name.startswith(("loss", "parameters")) for name in report.summary)
    with pytest.raises(UserError, match="--parts has 'chess'; they are text, path_star, countdown, tracking"):
        field.field("cpu", tmp_path / "out", parts=["chess"])
