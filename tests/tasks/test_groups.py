from __future__ import annotations

import math

import numpy as np
import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.groups import make_group

ORDERS = {"S2": 2, "S3": 6, "S5": 120, "A3": 3, "A4": 12, "A5": 60, "Z2": 2, "Z60": 60, "D3": 6, "D5": 10}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_a_named_group_is_one(name: str, order: int) -> None:
    group = make_group(name)
    assert group.order == order == len(set(group.names))
    every = np.arange(order)
    assert (group.table[0] == every).all()
    assert (group.table[:, 0] == every).all()
    assert (np.sort(group.table, axis=0) == every[:, None]).all()
    assert (np.sort(group.table, axis=1) == every).all()
    assert (group.table[group.table] == group.table[:, group.table]).all()  # (a·b)·c = a·(b·c)
    assert group.is_abelian == (name in ("S2", "A3", "Z2", "Z60"))


def test_products_are_read_from_the_left() -> None:
    group = make_group("S3")
    number = {name: index for index, name in enumerate(group.names)}
    # First 0 and 1 change places, then 1 and 2: 0 goes to 1 to 2, 1 to 0, 2 to 1.
    assert group.table[number["(0,1)"], number["(1,2)"]] == number["(0,2,1)"]
    assert group.table[number["(1,2)"], number["(0,1)"]] == number["(0,1,2)"]
    assert group.elements[number["(0,2,1)"]].tolist() == [2, 0, 1]


def test_rotations_are_numbers_that_add_up() -> None:
    group = make_group("Z60")
    assert group.names == tuple(map(str, range(60)))
    assert (group.table == (np.arange(60)[:, None] + np.arange(60)) % 60).all()


def test_alternating_groups_are_the_even_permutations() -> None:
    for element in make_group("A4").elements:
        inversions = sum(element[i] > element[j] for i in range(4) for j in range(i + 1, 4))
        assert inversions % 2 == 0


def test_generators_in_cycle_notation() -> None:
    assert make_group(("(0 1 2)(3 4)",)).order == 6
    assert make_group(("(0 1 2 3 4)", "(0 1)")).order == math.factorial(5)
    assert make_group(("(0,1,2)",)).names == ("()", "(0,1,2)", "(0,2,1)")
    assert make_group(("()", "(1 2)")).names == ("()", "(1,2)")


@pytest.mark.parametrize("name", ["S1", "A2", "D2", "Q8", "Z", "s3", "S3 ", "Z0"])
def test_names_that_mean_no_group(name: str) -> None:
    with pytest.raises(UserError, match=f"--group {name} is none of Sn and Zn"):
        make_group(name)


@pytest.mark.parametrize("generator", ["0 1 2", "(0 1", "(a b)", "", "(0 1) x"])
def test_what_is_no_cycle_notation(generator: str) -> None:
    with pytest.raises(UserError, match="is no permutation in cycle notation"):
        make_group((generator,))


def test_what_is_no_permutation_and_what_is_too_large() -> None:
    with pytest.raises(UserError, match="has a point twice"):
        make_group(("(0 1)(1 2)",))
    with pytest.raises(UserError, match="one above 1000"):
        make_group(("(0 5000)",))
    with pytest.raises(UserError, match="--group S7 has more than 1000 elements"):
        make_group("S7")
    with pytest.raises(UserError, match=r"--generators '\(0 1 2 3 4 5 6 7\)' '\(0 1\)' has more than 1000"):
        make_group(("(0 1 2 3 4 5 6 7)", "(0 1)"))
