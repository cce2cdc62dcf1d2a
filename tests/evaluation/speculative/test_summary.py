"""Rows, comparisons, flat names, claims and tables of hand-made trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from nextlat_dist.evaluation.speculative.comparison import CellComparison, compare
from nextlat_dist.evaluation.speculative.records import (
    ALL,
    HUGGING_FACE,
    MTP,
    NEXTLAT,
    Cell,
    Method,
    Outcome,
    Outcomes,
    rows_of,
)
from nextlat_dist.evaluation.speculative.summary import claims, headline, summarise, tables
from nextlat_dist.reporting.tables import table

CODE = Cell("code", 1, 0.0)


def trials_at(rates: Sequence[float], cpu_factor: float | None = 1.0, cycles: int = 50, **counts: Any) -> list[Outcome]:
    """One row of 101 tokens per trial; the prefill takes a second."""
    return [
        Outcome(
            half=index % 2,
            rows=1,
            tokens=101,
            later_tokens=100,
            prefill_seconds=1.0,
            decode_seconds=100 / rate,
            cpu_seconds=None if cpu_factor is None else 100 / rate / cpu_factor,
            cycles=cycles,
            drafted_by_position=counts.get("drafted", []),
            accepted_by_position=counts.get("accepted", []),
            differing=counts.get("differing", 0),
            repeated_share=0.25,
        )
        for index, rate in enumerate(rates)
    ]


def outcomes(adaptive: float = 2.1, cpu_factor: float | None = 1.0) -> Outcomes:
    """Four trials of which the third is ten times slower for everybody."""
    speed = [100.0, 100.0, 10.0, 100.0]

    def at(factor: float, **options: Any) -> list[Outcome]:
        return trials_at([factor * rate for rate in speed], cpu_factor, **options)

    return {
        Method(NEXTLAT, 0): at(1.0, cycles=100),
        Method(NEXTLAT, 2): at(2.0, cycles=40, drafted=[40, 40], accepted=[35, 25], differing=1),
        Method(NEXTLAT, 5): at(1.5, cycles=25),
        Method(NEXTLAT, "adaptive"): at(adaptive, cycles=40, drafted=[40, 20], accepted=[40, 20]),
        Method(MTP, 0): at(1.1, cycles=100),
        Method(MTP, 1): at(1.4, cycles=60),
        Method(HUGGING_FACE, 0): at(0.25, cycles=100),
        Method(HUGGING_FACE, "prompt_lookup"): at(0.5, cycles=80),
    }


def json_rows(cells: Mapping[Cell, Outcomes]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows_of(cells)]


def entry_of(measured: Outcomes) -> dict[str, Any]:
    """The comparison of one cell by flat names."""
    (found,) = compare({CODE: measured})
    return found.to_json()


def test_rows() -> None:
    rows = {(row["model"], row["draft_length"]): row for row in json_rows({CODE: outcomes(cpu_factor=2.0)})}
    row = rows[NEXTLAT, 2]
    assert (row["domain"], row["batch_size"], row["temperature"], row["turns"]) == ("code", 1, 0.0, 4)
    assert (row["tokens"], row["cycles"], row["greedy_differing"]) == (404, 160, 4)
    assert row["tokens_per_second"] == 200.0
    assert row["tokens_per_second_low"] < 200.0  # one trial in four was slow
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == pytest.approx(2.0)
    assert row["tokens_per_cpu_second"] == pytest.approx(400.0)
    assert row["cpu_speedup"] == pytest.approx(2.0)
    assert row["tokens_per_second_with_prefill"] == pytest.approx(101 / 1.5)
    assert row["speedup_with_prefill"] == pytest.approx(2 / 1.5)
    assert row["tokens_per_cycle"] == pytest.approx(2.5)
    assert row["accepted_tokens_per_cycle"] == pytest.approx(1.5)
    assert row["acceptance_by_position"] == [35 / 40, 25 / 40]
    assert row["repeated_4gram_share"] == 0.25
    assert rows[MTP, 1]["speedup"] == pytest.approx(1.4 / 1.1)  # over its own baseline
    assert rows[HUGGING_FACE, "prompt_lookup"]["speedup"] == pytest.approx(0.5)  # over NextLat's
    sampled = json_rows({Cell("code", 1, 1.0): outcomes(cpu_factor=None)})
    assert all(row["greedy_differing"] is None and "cpu_speedup" not in row for row in sampled)


def test_trials_without_processor_time_are_compared_by_the_clock_alone() -> None:
    """A clock that ticks every few milliseconds, as under `ulimit -t`, does not see all of them."""
    measured = outcomes()
    lead = measured[Method(NEXTLAT, 2)]
    measured[Method(NEXTLAT, 2)] = [replace(lead[0], cpu_seconds=None), *lead[1:]]
    entry = entry_of(measured)
    assert not [name for name in entry if name.startswith("cpu_")]
    assert entry["mtp_cpu_speedup_fixed_best"] > 1
    assert entry["speedup_fixed_best"] == pytest.approx(2.0)


def test_a_cell_compares_its_methods() -> None:
    entry = entry_of(outcomes())
    assert entry["baseline_tokens_per_second"] == 100.0
    assert entry["draft_length_fixed_best"] == 2
    assert entry["speedup_fixed_best"] == entry["speedup_fixed_best_in_sample"] == pytest.approx(2.0)
    assert entry["accepted_fixed_best"] == pytest.approx(1.5)
    assert entry["speedup_adaptive"] == entry["speedup_adaptive_low"] == pytest.approx(2.1)
    assert entry["accepted_adaptive"] == pytest.approx(1.5)
    assert entry["drafted_adaptive"] == pytest.approx(1.5)
    assert entry["adaptive_over_fixed_best"] == entry["cpu_adaptive_over_fixed_best"] == pytest.approx(1.05)
    assert entry["adaptive_keeps_up"] is entry["cpu_adaptive_keeps_up"] is True
    assert entry["mtp_draft_length_fixed_best"] == 1
    assert entry["mtp_baseline_tokens_per_second"] == pytest.approx(110.0)
    assert entry["mtp_speedup_fixed_best"] == pytest.approx(1.4 / 1.1)
    assert entry["nextlat_over_mtp"] == pytest.approx(2.1 / 1.4)
    assert entry["nextlat_ahead_of_mtp"] is True
    assert entry["hugging_face_over_baseline"] == pytest.approx(0.25)
    assert entry["hugging_face_tokens_per_second"] == pytest.approx(25.0)
    assert entry["hugging_face_prompt_lookup_over_baseline"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("adaptive", "keeps_up", "never_slower"),
    [(2.0, True, True), (1.99, False, True), (0.98, False, True), (0.97, False, False)],
)
def test_verdicts_of_a_cell(adaptive: float, keeps_up: bool, never_slower: bool) -> None:
    """Without noise the intervals are points."""
    entry = entry_of(outcomes(adaptive))
    assert (entry["adaptive_keeps_up"], entry["adaptive_never_slower"]) == (keeps_up, never_slower)


def test_noise_within_the_interval_counts_as_keeping_up() -> None:
    noisy: dict[Method, Sequence[Outcome]] = {
        Method(NEXTLAT, 0): trials_at([100.0] * 6),
        Method(NEXTLAT, 1): trials_at([200.0] * 6),
        Method(NEXTLAT, "adaptive"): trials_at([198.0, 190.0, 204.0, 198.0, 196.0, 203.0]),
    }
    entry = entry_of(noisy)
    assert entry["adaptive_over_fixed_best"] == pytest.approx(0.99)
    assert entry["adaptive_over_fixed_best_low"] < 0.99
    assert entry["adaptive_over_fixed_best_high"] > 1.0
    assert entry["adaptive_keeps_up"] is True


def test_what_was_not_measured_is_absent() -> None:
    measured = {method: own for method, own in outcomes(cpu_factor=None).items() if method.model == NEXTLAT}
    del measured[Method(NEXTLAT, "adaptive")]
    entry = entry_of(measured)
    assert not [name for name in entry if "adaptive" in name or "mtp" in name or "cpu" in name or "face" in name]
    ((columns, rows),) = tables(compare({CODE: measured}))
    assert "adaptive" not in dict(columns)
    assert "2.00" in table(columns, rows)
    only_adaptive = {
        method: own
        for method, own in outcomes().items()
        if method == Method(NEXTLAT, 0) or method.draft_length == "adaptive"
    }
    assert "adaptive_over_fixed_best" not in entry_of(only_adaptive)
    assert "–" in table(*tables(compare({CODE: only_adaptive}))[0])


@pytest.mark.parametrize("cpu_factor", [1.0, None])
def test_a_comparison_is_read_back(cpu_factor: float | None) -> None:
    everything = outcomes(cpu_factor=cpu_factor) | {
        Method("third", 0): trials_at([100.0] * 4, cpu_factor),
        Method("third", 3): trials_at([300.0] * 4, cpu_factor),
        Method("undrafted", 0): trials_at([90.0] * 4, cpu_factor),
    }
    alone = {method: own for method, own in everything.items() if method.model == NEXTLAT}
    for measured in (everything, alone):
        (found,) = compare({CODE: measured})
        models = [export.model for export in found.exports]
        assert models == list(dict.fromkeys(method.model for method in measured if method.model != HUGGING_FACE))
        assert CellComparison.from_json(found.to_json(), models) == found
        assert [lead.other for lead in found.leads] == [model for model in models[1:] if model != "undrafted"]


def test_flat_names_and_verdicts_over_all_cells() -> None:
    cells = {
        CODE: outcomes(),
        Cell("prose", 8, 0.6): outcomes(1.9),
        Cell(ALL, 1, 0.0): outcomes(0.5),
        Cell(ALL, 8, 0.6): outcomes(0.5),
    }
    compared = compare(cells)
    summary = summarise(compared)
    assert summary["code_b1_t0_speedup_adaptive"] == pytest.approx(2.1)
    assert summary["prose_b8_t0.6_adaptive_over_fixed_best"] == pytest.approx(0.95)
    assert summary["prose_b8_t0.6_accepted_adaptive"] == pytest.approx(1.5)
    assert summary["all_b8_t0.6_draft_length_fixed_best"] == 2
    assert summary["mtp_code_b1_t0_speedup_fixed_best"] == pytest.approx(1.4 / 1.1)
    assert summary["code_b1_t0_nextlat_over_mtp"] == pytest.approx(1.5)
    assert all(isinstance(value, (int, float)) for value in summary.values())
    # One domain that is slower is enough; all domains together are not a domain.
    assert summary["adaptive_keeps_up"] is False
    assert summary["adaptive_never_slower"] is True
    sentences = [claim.sentence for claim in claims(compared)]
    assert len(sentences) == 6  # three claims by two clocks
    assert (
        "in 1 of 2 cells; the lowest ratio is 0.950 (0.950–0.950), prose at batch 8, temperature 0.6." in sentences[0]
    )
    assert sentences[0].startswith("By the clock, adaptive keeps up")
    assert sentences[3].startswith("By processor time, adaptive reaches 0.98")
    assert "in 2 of 2 cells; the lowest ratio is 1.429" in sentences[4]  # 2.0 over 1.4: the best way of each


def test_processor_time_has_verdicts_of_its_own() -> None:
    """Slow by the clock alone: the machine took the processor away."""
    measured = dict(outcomes())
    measured[Method(NEXTLAT, "adaptive")] = trials_at([90.0, 90.0, 9.0, 90.0], cpu_factor=2.5)
    summary = summarise(compare({CODE: measured}))
    assert (summary["adaptive_never_slower"], summary["cpu_adaptive_never_slower"]) == (False, True)
    assert (summary["adaptive_keeps_up"], summary["cpu_adaptive_keeps_up"]) == (False, True)


def test_headline() -> None:
    cells = {
        Cell(domain, batch_size, temperature): outcomes(2.0 + temperature)
        for domain in ("code", ALL)
        for batch_size in (8, 1)
        for temperature in (0.0, 0.6, 1.0)
    }
    cells[Cell(ALL, 8, 0.0)] = cells[Cell("code", 1, 0.0)] = outcomes(0.1)
    found = headline(compare(cells), rows_of(cells))
    assert found["draft_length"] == found["sampled_draft_length"] == 2
    assert found["speedup"] == pytest.approx(2.0)
    assert found["accepted_tokens_per_cycle"] == pytest.approx(1.5)
    assert found["speedup_adaptive"] == pytest.approx(2.0)
    assert found["sampled_speedup_adaptive"] == pytest.approx(3.0)
    assert found["baseline_tokens_per_second"] == 100.0


def test_the_headline_is_held_out_and_says_which_length_each_number_belongs_to() -> None:
    """Length 1 is fast in the even trials, length 2 in the odd ones: chosen on one half, each fails on the other."""
    fast_even, fast_odd = [300.0, 100.0] * 3, [100.0, 320.0] * 3
    greedy: dict[Method, Sequence[Outcome]] = {
        Method(NEXTLAT, 0): trials_at([100.0] * 6, cycles=100),
        Method(NEXTLAT, 1): trials_at(fast_even, cycles=80),
        Method(NEXTLAT, 2): trials_at(fast_odd, cycles=50),
        Method(NEXTLAT, "adaptive"): trials_at([150.0] * 6, cycles=60),
    }
    sampled = {**greedy, Method(NEXTLAT, 5): trials_at([400.0] * 6, cycles=25)}
    cells = {Cell(ALL, 1, 0.0): greedy, Cell(ALL, 1, 1.0): sampled}
    found = headline(compare(cells), rows_of(cells))
    assert found["speedup"] == found["speedup_low"] == found["speedup_high"] == pytest.approx(1.0)
    assert found["speedup_in_sample"] == pytest.approx(2.1)  # the median of 1.0 and 3.2
    assert found["draft_length"] == 2
    # Even trials at length 2 (50 cycles), odd ones at length 1 (80): 100 tokens in 65 cycles on average.
    assert found["accepted_tokens_per_cycle"] == pytest.approx(100 / 65 - 1)
    assert found["tokens_per_cycle"] == pytest.approx(100 / 65)
    assert found["speedup_with_prefill"] == pytest.approx(1.0)
    assert found["sampled_draft_length"] == 5
    assert found["sampled_speedup"] == found["sampled_speedup_in_sample"] == pytest.approx(4.0)
    assert found["sampled_accepted_tokens_per_cycle"] == pytest.approx(3.0)
    assert found["speedup_adaptive"] == found["speedup_adaptive_low"] == pytest.approx(1.5)


def test_tables() -> None:
    everything = compare({Cell("prose", 8, 1.0): outcomes(), CODE: outcomes()})
    own, others = (table(*one).splitlines() for one in tables(everything))
    assert own[0].split()[8:] == ["accepted", "adaptive", "(95%)", "accepted", "adaptive/fixed", "(95%)"]
    assert own[1].split() == [
        "1",
        "0",
        "code",
        "100",
        "2",
        "2.00",
        "1.50",
        "2.10",
        "2.10–2.10",
        "1.50",
        "1.050",
        "1.050–1.050",
    ]
    assert others[1].split() == ["1", "0", "code", "1", "1.27", "0.67", "–", "1.50", "1.50–1.50", "0.25", "0.50"]
    assert [line.split()[:3] for line in (own[2], others[2])] == [["8", "1", "prose"]] * 2
    outside = {method: own for method, own in outcomes().items() if method.model != MTP}
    alone = {method: own for method, own in outside.items() if method.model == NEXTLAT}
    _, (columns, rows) = tables(compare({CODE: outside, Cell("code", 8, 0.0): alone}))
    assert "MTP best fixed" not in dict(columns)
    assert [row["cell"].batch_size for row in rows] == [1]
