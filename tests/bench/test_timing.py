from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from nextlat_dist.bench.timing import Rates, alternate, cores, row


def test_cores_are_given_back_and_inherited_by_what_starts_inside() -> None:
    before = os.sched_getaffinity(0)
    of_thread: list[set[int]] = []
    with cores(1):
        (core,) = os.sched_getaffinity(0)
        thread = threading.Thread(target=lambda: of_thread.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        code = "import os; print(os.sched_getaffinity(0))"
        child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert core in before
    assert of_thread == [{core}]
    assert child.strip() == f"{{{core}}}"
    assert os.sched_getaffinity(0) == before


def test_cores_are_given_back_after_an_error() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError), cores(1):
        raise RuntimeError
    assert os.sched_getaffinity(0) == before


def test_a_ratio_compares_within_rounds() -> None:
    """A round in which the machine is ten times faster, or one method is out of luck, changes nothing."""
    ours, theirs = Rates((20.0, 200.0, 60.0), (1.0,)), Rates((10.0, 100.0, 1.0), (1.0,))
    assert ours.ratio_to(theirs) == 2
    assert theirs.ratio_to(ours) == 0.5
    assert Rates((1.0, 100.0, 3.0), (5.0, 4.0, 200.0)).median == 3
    assert Rates((1.0, 100.0, 3.0), (5.0, 4.0, 200.0)).cpu_median == 5


def test_methods_alternate_and_the_first_trial_does_not_count() -> None:
    order: list[str] = []
    units = {"a": iter((10**9, 1, 2)), "b": iter((10**9, 3, 4))}

    def method(name: str) -> int:
        order.append(name)
        time.sleep(0.01)
        return next(units[name])

    told: list[str] = []
    rates = alternate({name: lambda name=name: method(name) for name in "ab"}, 2, told.append)
    assert order == list("abbaab")
    assert told == order
    assert {name: len(value.rounds) for name, value in rates.items()} == {"a": 2, "b": 2}
    assert max(rates["a"].rounds + rates["b"].rounds) <= 4 / 0.01
    # The process sleeps, which costs it nothing.
    assert all(max(value.rounds) < min(value.cpu_rounds) for value in rates.values())


def test_a_row_has_every_column() -> None:
    assert row("one", rates=Rates((1.0, 5.0, 2.0), (7.0, 9.0, 8.0))) == {
        "measurement": "one",
        "tokens_per_second": 2.0,
        "lowest": 1.0,
        "highest": 5.0,
        "tokens_per_cpu_second": 8.0,
        "seconds": None,
    }
    assert row("two", seconds=0.5)["tokens_per_second"] is None
