"""Keys of the schema: every one has a sentence, every number its bounds, and bounds are looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import pytest

from nextlat_dist.config import load_config
from nextlat_dist.config.keys import ANY, NOT_NEGATIVE, POSITIVE, Bounds, Key, check_bounds, keys_of, walk
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
    open_ended = [name for name, key in KEYS.items() if key.hint in NUMBERS and not limited(key)]
    assert open_ended == []
    decided_between_values = [name for name, key in KEYS.items() if key.bounds and key.bounds.rule == ANY.rule]
    assert decided_between_values == ["data.weight_changes[].at_tokens"]


NUMBERS = (int, float, int | None, float | None)


def limited(key: Key) -> bool:
    return key.bounds is not None and key.bounds.limits is not None


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


def with_rule(bounds: Bounds) -> list[str]:
    """Keys outside lists of sections."""
    return [name for name, key in KEYS.items() if key.bounds and key.bounds.rule == bounds.rule and "[" not in name]


@pytest.mark.parametrize("name", with_rule(POSITIVE))
def test_every_positive_key_of_a_run_is_checked(name: str) -> None:
    null = " or null" if KEYS[name].optional else ""
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{name}=-1"])
    assert str(caught.value) in (
        f"{name} is -1, it must be positive{null}",
        f"{name} is -1.0, it must be positive{null}",
    )


@pytest.mark.parametrize("name", with_rule(NOT_NEGATIVE))
def test_every_key_that_may_be_zero_is_checked(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{name}=-1"])
    assert str(caught.value).startswith(f"{name} is -1")
    assert str(caught.value).endswith("it must not be negative")


def test_a_source_with_a_negative_weight_is_named_by_its_number() -> None:
    sources = "data.sources=[{name: a, path: a}, {name: b, path: b, weight: -2}]"
    with pytest.raises(UserError, match=r"^data\.sources\[1\]\.weight is -2\.0, it must not be negative$"):
        load_config(None, [sources])


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if limited(key) and "[" not in name])
def test_no_number_is_beyond_its_limits(name: str) -> None:
    """The largest value is no error of this key; a larger one is, and so is a smaller one where there is a least."""
    limits = KEYS[name].bounds.limits  # type: ignore[union-attr]
    assert limits is not None
    low, high = limits
    assert float("-inf") < low < high < float("inf")
    for beyond in (2 * high, 1e300, *([low / 2] if low > 0 else [])):
        with pytest.raises(UserError) as caught:
            load_config(None, [f"{name}={beyond!r}"])
        text = str(caught.value)
        assert text.startswith(f"{name} is "), text
        assert " at most " in text or " at least " in text or "it must be of type int" in text


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.max_quarantined_fraction=5", "data.max_quarantined_fraction is 5.0, it must be at most 1"),
        ("data.workers=100000", "data.workers is 100000, it must be at most 256"),
        ("watchdog.timeout_seconds=1e-300", "watchdog.timeout_seconds is 1e-300, it must be 0 or at least 1"),
        ("optimizer.lr=1e300", "optimizer.lr is 1e+300, it must be at most 100"),
        ("optimizer.lr=1e-300", "optimizer.lr is 1e-300, it must be at least 1e-15"),
        ("training.seed=9223372036854775808", "training.seed is 9223372036854775808, it must be at most 9_223_372_"),
        ("training.train_tokens=99999999999999999999", "training.train_tokens is 99999999999999999999, it must be at "),
    ],
)
def test_nonsense_is_refused_at_the_key(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert str(caught.value).startswith(sentence)


def test_zero_stays_what_it_was_where_there_is_a_least() -> None:
    assert load_config(None, ["watchdog.timeout_seconds=0"]).watchdog.timeout_seconds == 0.0
    assert load_config(None, ["watchdog.timeout_seconds=1"]).watchdog.timeout_seconds == 1.0
    assert load_config(None, ["training.seed=9223372036854775807"]).training.seed == 2**63 - 1
