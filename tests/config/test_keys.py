"""Keys of the schema: every one has a sentence, every number its bounds, and bounds are looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import pytest

from nextlat_dist.config import load_config
from nextlat_dist.config.keys import ANY, NOT_NEGATIVE, POSITIVE, Key, check_bounds, keys_of, walk
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError

KEYS = dict(walk(RunConfig))


def numeric(hint: Any) -> bool:
    """Whether a value of this type holds a number: itself, as an entry of a list or as a value of a mapping."""
    return hint in (int, float) or any(map(numeric, get_args(hint)))


def unbounded(keys: dict[str, Key]) -> list[str]:
    return [name for name, key in keys.items() if numeric(key.hint) and key.bounds is None]


def test_the_walk_reaches_every_section() -> None:
    assert {name.partition(".")[0] for name in KEYS} == set(keys_of(RunConfig))
    assert {"model.num_layers", "data.sources", "data.sources[].weight", "data.weight_changes[].at_tokens"} <= set(KEYS)
    assert len(KEYS) > 60


def test_every_numeric_key_has_bounds_and_every_key_a_sentence() -> None:
    assert unbounded(KEYS) == []
    assert [name for name, key in KEYS.items() if not key.help] == []
    assert [name for name, key in KEYS.items() if key.bounds is ANY] == [
        "data.weight_changes[].at_tokens",
        "data.weight_changes[].weights",
    ]


@dataclass
class Inner:
    size: Annotated[int, "has bounds", POSITIVE] = 1
    share: float | None = None  # has none


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    several: list[Inner] = field(default_factory=list)
    name: str = ""


def test_a_number_without_bounds_is_noticed() -> None:
    assert unbounded(dict(walk(Outer))) == ["inner.share", "several[].share"]


def test_bounds_are_checked_in_every_section_and_entry() -> None:
    check_bounds(Outer(several=[Inner(1)]))
    with pytest.raises(UserError, match=r"^inner\.size is 0, it must be positive$"):
        check_bounds(Outer(inner=Inner(0)))
    with pytest.raises(UserError, match=r"^several\[1\]\.size is -2, it must be positive$"):
        check_bounds(Outer(several=[Inner(1), Inner(-2)]))


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.bounds is POSITIVE and "[" not in name])
def test_every_positive_key_of_a_run_is_checked(name: str) -> None:
    null = " or null" if KEYS[name].optional else ""
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{name}=-1"])
    assert str(caught.value) in (
        f"{name} is -1, it must be positive{null}",
        f"{name} is -1.0, it must be positive{null}",
    )


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.bounds is NOT_NEGATIVE and "[" not in name])
def test_every_key_that_may_be_zero_is_checked(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{name}=-1"])
    assert str(caught.value).startswith(f"{name} is -1")
    assert str(caught.value).endswith("it must not be negative")


def test_a_source_with_a_negative_weight_is_named_by_its_number() -> None:
    sources = "data.sources=[{name: a, path: a}, {name: b, path: b, weight: -2}]"
    with pytest.raises(UserError, match=r"^data\.sources\[1\]\.weight is -2\.0, it must not be negative$"):
        load_config(None, [sources])
