from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nextlat_dist.data.order import GlobalOrder, WindowPart, permutation


def test_permutation_is_fixed_for_ever() -> None:
    """A change here changes the data order of every run: it needs a new format version."""
    assert permutation(8, 0, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, 1, 0, 0).tolist() != permutation(8, 0, 1, 0).tolist()
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))


def test_epochs_and_seeds_differ_and_records_differ_inside_an_epoch() -> None:
    order = GlobalOrder(np.full(50, 2), seed=1, shuffle=True)
    other = GlobalOrder(np.full(50, 2), seed=2, shuffle=True)
    epochs = [[record for n in range(50) for record in order.records(e, n).tolist()] for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [record for n in range(50) for record in other.records(0, n).tolist()]
    inside = [order.documents(epoch, window, 20) for epoch in range(2) for window in range(2)]
    assert len({tuple(documents.tolist()) for documents in inside if documents is not None}) == 4


def test_without_shuffle_the_stored_order_repeats() -> None:
    order = GlobalOrder(np.array([3, 2]), seed=1, shuffle=False)
    assert list(order.spans(1, 9)) == [
        WindowPart(0, 0, 1, 3),
        WindowPart(0, 1, 0, 2),
        WindowPart(1, 0, 0, 3),
        WindowPart(1, 1, 0, 1),
    ]
    assert order.documents(0, 0, 20) is None


@given(
    units=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any),
    shuffle=st.booleans(),
    size=st.integers(1, 4),
    begin=st.integers(0, 60),
    length=st.integers(0, 40),
)
def test_a_span_found_by_seeking_is_the_one_found_by_walking(
    units: list[int], shuffle: bool, size: int, begin: int, length: int
) -> None:
    """Against a list of every unit of the stream, one by one."""
    order = GlobalOrder(np.array(units), seed=5, shuffle=shuffle, window_records=size)
    walked: list[tuple[int, int, int]] = []
    for epoch in range(200):
        if len(walked) >= begin + length:
            break
        records = [int(r) for r in (permutation(len(units), 5, epoch, 0) if shuffle else range(len(units)))]
        windows = [records[at : at + size] for at in range(0, len(records), size)]
        for number, window in enumerate(windows):
            assert order.records(epoch, number).tolist() == window
            walked += [(epoch, number, unit) for unit in range(sum(units[record] for record in window))]
    found = [(s.epoch, s.window, unit) for s in order.spans(begin, begin + length) for unit in range(s.begin, s.end)]
    assert found == walked[begin : begin + length]


def test_seeking_far_costs_no_walk() -> None:
    order = GlobalOrder(np.full(1000, 30000), seed=0, shuffle=True)
    far = 10**15 + 7
    (span,) = order.spans(far, far + 1)
    assert span.epoch == far // 30_000_000
    assert span.begin == far % 30_000
