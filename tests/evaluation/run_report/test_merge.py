"""The run report from hand-made files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.run_report.publish import loss_terms_figure, time_split_figure, write_run_report
from nextlat_dist.reporting import report

STEPS = [
    {
        "step": s,
        "tokens": 100 * s,
        "loss": 10.0 - s,
        "next_token": 7.0 - s,
        "hidden": 2.0,
        "kl": 1.0,
        "tokens_per_second": r,
    }
    for s, r in zip(range(1, 8), [1, 50, 60, 55, 52, 58, 1000], strict=True)
]
VALIDATION = [{"step": 3, "tokens": 300, "validation_loss": 9.5}, {"step": 7, "tokens": 700, "validation_loss": 4.25}]


def write_run(directory: Path, entries: list[dict[str, Any]]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_speculative(directory: Path, identical: bool) -> None:
    where = {"domain": "all", "batch_size": 1, "temperature": 0.0}
    row = where | {
        "model": "nextlat",
        "draft_length": 3,
        "tokens_per_second": 900.0,
        "speedup": 1.5,
        "speedup_low": 1.4,
        "speedup_high": 1.6,
        "speedup_with_prefill": 1.45,
        "accepted_tokens_per_cycle": 1.25,
        "tokens_per_cycle": 2.25,
        "greedy_differing": 0,
        "repeated_4gram_share": 0.5,
    }
    cell = where | {
        "baseline_tokens_per_second": 600.0,
        "baseline_tokens_per_second_low": 590.0,
        "baseline_tokens_per_second_high": 610.0,
        "draft_length_fixed_best": 3,
        "speedup_fixed_best": 1.5,
        "speedup_fixed_best_low": 1.4,
        "speedup_fixed_best_high": 1.6,
        "accepted_fixed_best": 1.25,
        "speedup_adaptive": 1.7,
        "speedup_adaptive_low": 1.65,
        "speedup_adaptive_high": 1.75,
        "accepted_adaptive": 2.0,
        "adaptive_over_fixed_best": 1.133,
        "adaptive_over_fixed_best_low": 1.1,
        "adaptive_over_fixed_best_high": 1.2,
    }
    summary = {
        "greedy_identical": identical,
        "greedy_differences": 0 if identical else 2,
        "greedy_largest_logit_gap": 0.0 if identical else 3e-6,
        "draft_length": 3,
        "prompts": 24,
        "accepted_tokens_per_cycle": 1.25,
        "speedup": 1.5,
        "speedup_in_sample": 1.6,
        "sampled_draft_length": 5,
        "sampled_accepted_tokens_per_cycle": 0.75,
        "sampled_speedup": 2.5,  # of an earlier release, which did not hold it out
        "speedup_adaptive": 1.7,
        "code_b1_t0_speedup_adaptive": 1.6,
    }
    rows = [row, {**row, "domain": "code", "speedup": 7.25}, {**row, "model": "mtp", "speedup": 8.25}]
    measured = report.Report("nextlat evaluate speculative", {"max_new_tokens": 128}, summary, rows)
    content = measured.content() | {
        "cells": [cell],
        "verdicts": ["Adaptive keeps up."],
        "costs": [
            {
                "model": "nextlat",
                "batch_size": 1,
                "plain_step_seconds": 0.002,
                "draft": 0.2,
                "verify": {"1": 1.0, "4": 1.3},
            }
        ],
        "caveat": "Loops flatter.",
    }
    report.write_json(directory / "speculative.json", content)


def test_full_report(tmp_path: Path) -> None:
    write_run(tmp_path, [*STEPS[:3], VALIDATION[0], *STEPS[3:], VALIDATION[1]])
    write_speculative(tmp_path, identical=True)
    report.write_json(tmp_path / "export" / "export_report.json", {"max_logit_difference": 2e-6})
    (tmp_path / "speedup_by_draft_length.png").write_bytes(b"")
    content = write_run_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert content["train"] == {
        "loss_first": 9.0,
        "loss_last": 5.0,  # the mean of 7, 6, 5, 4, 3
        "validation_loss": 4.25,
        "tokens": 700,
        "tokens_per_second": 55,
    }
    assert content["export"] == {"max_logit_difference": 2e-6}
    assert content["speculative"] == {
        "greedy_identical": True,
        "draft_length": 3,
        "accepted_tokens_per_cycle": 1.25,
        "speedup": 1.5,
        "speedup_in_sample": 1.6,
        "sampled_draft_length": 5,
        "sampled_accepted_tokens_per_cycle": 0.75,
        "speedup_adaptive": 1.7,
        "prompts": 24,
    }
    text = (tmp_path / "report.md").read_text()
    for expected in (
        "9.0000 (first logged) → 5.0000 (mean of the last 5 logged)",
        "validation loss 4.2500",
        "2.00e-06",
        "token for token",
        "Loops flatter.",
        "| 1 | 0 | all | 600 | 3 | 1.50 | 1.25 | 1.70 | 1.65–1.75 | 2.00 | 1.133 | 1.100–1.200 |",
        "| 1 | 0 | 3 | 900 | 1.50 | 1.40–1.60 | 1.45 | 1.25 | 2.25 | 0 | 0.50 |",
        "Adaptive keeps up.",
        "batch 1: plain step 2.00 ms; draft step c = 0.200; v(4) = 1.30.",
        "(speedup_by_draft_length.png)",
    ):
        assert expected in text
    assert "7.25" not in text  # rows of single domains and of rivals are in the JSON alone
    assert "8.25" not in text
    assert "acceptance_by_position" not in text  # a picture that is not there is not shown
    assert (tmp_path / "loss_terms.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, STEPS)
    write_speculative(tmp_path, identical=False)
    assert write_run_report(tmp_path)["speculative"]["greedy_identical"] is False
    text = (tmp_path / "report.md").read_text()
    assert "2 greedy continuations differ" in text
    assert "at most 3.0e-06 apart" in text
    assert "token for token" not in text


def test_a_run_of_the_baseline(tmp_path: Path) -> None:
    """No predictor terms, no validation, no export, nothing speculative."""
    write_run(tmp_path, [{"step": 1, "tokens": 100, "loss": 3.0, "next_token": 3.0}])
    content = write_run_report(tmp_path)
    assert content == {
        "train": {
            "loss_first": 3.0,
            "loss_last": 3.0,
            "validation_loss": None,
            "tokens": 100,
            "tokens_per_second": None,
        }
    }
    text = (tmp_path / "report.md").read_text()
    assert "validation loss not measured" in text
    assert "speculative" not in text


def test_terms_of_any_objective_are_drawn_once_they_are_validated() -> None:
    steps = [{"step": 1, "tokens": 100, "loss": 3.0, "next_token": 3.0, "jump": 1.0, "learning_rate": 1e-3}]
    assert [axis.get_title() for axis in loss_terms_figure(steps).axes] == ["total", "next token"]
    validated = [*steps, {"step": 1, "tokens": 100, "validation_loss": 4.0, "validation_jump": 2.0}]
    *_, jump = loss_terms_figure(validated).axes
    assert jump.get_title() == "jump"
    assert [(line.get_label(), line.get_ydata()[0]) for line in jump.lines] == [("training", 1.0), ("validation", 2.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "holds no training step"),
        ('{"step": 1, "loss": 3}\n{"st', "line 2"),
        ("[]\n", "line 1"),
        ("[" * 100_000, "line 1"),
        ("\xff", "line 1"),
    ],
    ids=["none", "empty", "cut", "no object", "nested", "no text"],
)
def test_bad_metrics(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=message):
        write_run_report(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"summary": 3}', "\xff", "[" * 100_000])
def test_a_damaged_measurement_is_named(tmp_path: Path, content: str) -> None:
    write_run(tmp_path, STEPS)
    (tmp_path / "speculative.json").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=r"speculative[.]json.*run `nextlat evaluate speculative` again"):
        write_run_report(tmp_path)


def test_cut_documents_are_those_of_all_lines(tmp_path: Path) -> None:
    """A run that was killed has no last word, and one that was resumed counts from there on."""
    counts = {"cut_documents": 2, "documents": 4, "cut_tokens": 30, "document_tokens": 120}
    resumed = {"step": 3, "warning": {"cut_in": "this batch", "cut_documents": 1, "cut_documents_share": 1.0}}
    write_run(tmp_path, [{**STEPS[0], **counts}, {**STEPS[1], **counts}, resumed, {**STEPS[2], **counts}])
    train = write_run_report(tmp_path)["train"]
    assert (train["cut_documents"], train["cut_documents_share"], train["cut_tokens_share"]) == (6, 0.5, 0.25)


def test_the_time_of_a_step_and_its_memory(tmp_path: Path) -> None:
    """Shares of each line's time, their medians without the first line; the largest peak of any rank."""
    seconds = [(90.0, 10.0), (1.0, 3.0), (1.0, 3.0), (3.0, 1.0)]
    entries = [
        {
            **step,
            **{"seconds/data": 0.0, "seconds/forward": f, "seconds/step": s},
            **{"mfu": 0.1 * number, "peak_memory_gigabytes": [1.5, number]},
        }
        for number, (step, (f, s)) in enumerate(zip(STEPS, seconds, strict=False))
    ]
    write_run(tmp_path, entries)
    train = write_run_report(tmp_path)["train"]
    assert train["time_split"] == {"data": 0.0, "forward": 0.25, "step": 0.75}
    assert (train["mfu"], train["peak_memory_gigabytes"]) == (pytest.approx(0.2), 3)
    page = (tmp_path / "report.md").read_text()
    assert "Of a step's time: step 75%, forward 25%. MFU 20.0%. Peak memory of a rank: 3.00 GB." in page
    assert "![Time of a step](time_split.png)" in page
    assert (tmp_path / "time_split.png").stat().st_size > 5000


def test_parts_of_a_step_are_drawn_one_upon_the_other() -> None:
    lines = [
        {"tokens": 1e6 * n, "seconds/forward": 0.010, "seconds/step": 0.005, "seconds/data": 1e-5} for n in range(4)
    ]
    lines = [lines[0] | {"seconds/forward": 9.0}, *(line | {"seconds/other": 0.002} for line in lines)]
    (axis,) = time_split_figure(lines).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["other", "step", "forward"]
    tops = [collection.get_paths()[0].get_extents().ymax for collection in axis.collections]
    assert tops == [pytest.approx(10.0), pytest.approx(15.0), pytest.approx(17.01)]


def test_a_run_before_they_were_measured_has_none(tmp_path: Path) -> None:
    write_run(tmp_path, STEPS)
    assert "time_split" not in write_run_report(tmp_path)["train"]
    assert not (tmp_path / "time_split.png").exists()
