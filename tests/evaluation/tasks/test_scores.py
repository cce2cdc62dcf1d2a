"""Shares and curves against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks.scores import Curve, Share


def test_a_share_counts_cases() -> None:
    share = Share.of([True, False, True, True])
    assert (share.right, share.total, share.value) == (3, 4, 0.75)


def test_wilsons_interval_of_eight_in_ten() -> None:
    # z² = 3.8415: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half sqrt(0.38415 (0.16 + 0.09604)) / 1.38415 = 0.22658
    assert Share(8, 10).interval == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_wilsons_interval_at_the_ends() -> None:
    # 0 of 10: z²/n / (1 + z²/n) = 0.38415 / 1.38415
    assert Share(0, 10).interval == pytest.approx((0, 0.27753), abs=1e-5)
    assert Share(10, 10).interval == pytest.approx((1 - 0.27753, 1), abs=1e-5)


def test_nothing_counted_says_nothing() -> None:
    assert math.isnan(Share.of([]).value)
    assert Share.of([]).interval == (0, 1)


def test_a_curve_counts_the_documents_that_reach_a_position() -> None:
    curve = Curve.of(3, [np.array([True, False, True]), np.array([True]), np.array([False, True])])
    assert curve.shares == (Share(2, 3), Share(1, 2), Share(1, 1))
    assert (curve.first, curve.last) == (3, 5)
    assert curve.at(4) == Share(1, 2)


@pytest.mark.parametrize("position", [2, 6, -1])
def test_a_curve_has_no_other_positions(position: int) -> None:
    curve = Curve.of(3, [np.array([True, False, True])])
    with pytest.raises(IndexError):
        curve.at(position)
