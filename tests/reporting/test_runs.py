"""Numbers over runs, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from nextlat_dist.reporting.runs import OverRuns, over_runs


def test_several_runs() -> None:
    values = [0.25, 0.5, 0.9]
    found = over_runs(values, interval=(0.0, 1.0))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert (found.lowest, found.highest, found.n) == (0.25, 0.9, 3)
    assert found.bounds == (0.25, 0.9)  # the interval was a single run's
    assert found.with_deviation() == "0.550 ± 0.328"
    assert found.with_bounds() == "0.550 (0.250–0.900)"


def test_a_single_run_has_its_interval_or_nothing() -> None:
    assert over_runs([0.5]).bounds is None
    assert over_runs([0.5]).deviation is None
    assert over_runs([0.5]).with_bounds() == over_runs([0.5]).with_deviation() == "0.500"
    assert over_runs([0.5], interval=(0.4, 0.7)).with_bounds() == "0.500 (0.400–0.700)"


def test_refuses_no_run_and_an_interval_of_several() -> None:
    with pytest.raises(AssertionError, match="no run"):
        over_runs([])
    with pytest.raises(AssertionError, match="several runs"):
        OverRuns((0.1, 0.2), (0.0, 1.0))
