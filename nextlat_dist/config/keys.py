"""Keys of a configuration: `Annotated[type, "what it is", bounds]`, read at run time.

The sentence is the key's only description: `nextlat init` writes it as a comment and the configuration reference prints
it. The bounds are checked wherever a value of the section is, so a key cannot be added without them: a test walks
every numeric key of the schema.

    num_layers: Annotated[int, "decoder layers", POSITIVE] = 8
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin

from nextlat_dist.errors import UserError

LARGEST_WHOLE = 2**63 - 1  # what an int64 takes: rows, tokens and seeds are kept in them


@dataclass(frozen=True)
class Bounds:
    """Which values a key may have.

    Attributes:
        rule: completes the sentence "X is 0, it must …".
        holds: of a value that has the key's type; null is never asked about.
        limits: of a number, lowest and highest but for what `rule` says; None: it is no number, or a rule between
            values decides.
    """

    rule: str
    holds: Callable[[Any], bool]
    limits: tuple[float, float] | None = None

    def broken(self, value: Any) -> str | None:
        """The rule that `value` breaks, None where it breaks none."""
        if not self.holds(value):
            return self.rule
        if self.limits is not None and value:
            low, high = self.limits
            if value < low:
                return f"be {'0 or ' if self.holds(0) else ''}at least {_written(low)}"
            if value > high:
                return f"be at most {_written(high)}"
        return None

    def within(self, low: float, high: float) -> Bounds:
        """The same, for numbers from `low` to `high`; 0 stays what it was."""
        return replace(self, limits=(low, high))

    def at_most(self, high: float) -> Bounds:
        return self.within(-high, high)

    @property
    def sentence(self) -> str:
        """All of it, for the reference."""
        if self.limits is None:
            return self.rule
        low, high = self.limits
        least = f", {'0 or ' if self.holds(0) else ''}at least {_written(low)}" if low > 0 else ""
        most = "" if high == LARGEST_WHOLE else f", at most {_written(high)}"
        return self.rule + least + most


def _written(limit: float) -> str:
    """1000000, 1e-12."""
    return f"{limit:,}".replace(",", "_") if isinstance(limit, int) else f"{limit:g}"


POSITIVE = Bounds("be positive", lambda value: value > 0).at_most(LARGEST_WHOLE)
NOT_NEGATIVE = Bounds("not be negative", lambda value: value >= 0).at_most(LARGEST_WHOLE)
LOCATION = "a path or a URL"  # marks a key of which `~` and variables are replaced (locations.py)
ANY = Bounds("be a number", lambda _: True)  # a rule between values decides the rest (rules.py)


def _rising(points: list[list[float]]) -> bool:
    pairs = bool(points) and all(len(point) == 2 for point in points)
    tokens = [point[0] for point in points if point]
    return pairs and tokens[0] >= 0 and all(one < later for one, later in itertools.pairwise(tokens))


POINTS = Bounds(
    "give each a list of [tokens, value], its tokens rising from 0 or later, its values from 0 to 1e+6",
    lambda lists: all(_rising(points) and all(0 <= value <= 1e6 for _, value in points) for points in lists.values()),
)


def value_at(points: list[list[float]], tokens: int) -> float:
    """The value at `tokens` of lines between [tokens, value] points; outside of them that of the nearest."""
    before = points[0]
    for point in points:
        if tokens <= point[0]:
            share = 1.0 if point is before else (tokens - before[0]) / (point[0] - before[0])
            return before[1] + (point[1] - before[1]) * share
        before = point
    return before[1]


class _Short(reprlib.Repr):
    """Of a value from a file that may be anything: never long, never deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 200, 200, 100
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 8

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= self.maxstring else f"{x[: self.maxstring // 2]!r}… ({len(x):,} characters)"

    def repr_int(self, x: int, level: int) -> str:
        return str(x) if abs(x) < 10**self.maxlong else f"a number of {x.bit_length():,} bits"

    def repr_Plain(self, x: Any, level: int) -> str:
        return str(self.repr1(x.value, level))


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, cut where it is long."""
    return _Short().repr(value)


@dataclass(frozen=True)
class Key:
    """A field of a section. `default` is dataclasses.MISSING for a key that must be given."""

    name: str
    hint: Any
    help: str
    bounds: Bounds | None
    default: Any
    is_location: bool = False

    @property
    def optional(self) -> bool:
        return get_origin(self.hint) in (Union, types.UnionType) and type(None) in get_args(self.hint)

    @property
    def section(self) -> type | None:
        """The dataclass of a nested section."""
        return self.hint if isinstance(self.hint, type) and dataclasses.is_dataclass(self.hint) else None


@functools.cache
def keys_of(section: type) -> dict[str, Key]:
    """The fields of a dataclass by name; a nested section's default is MISSING, its own keys have theirs."""
    plain = typing.get_type_hints(section)
    annotated = typing.get_type_hints(section, include_extras=True)
    found = {}
    for field in dataclasses.fields(section):
        hint = annotated[field.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        found[field.name] = Key(
            name=field.name,
            hint=plain[field.name],
            help=next((note for note in notes if isinstance(note, str)), ""),
            is_location=LOCATION in notes[1:],
            bounds=next((note for note in notes if isinstance(note, Bounds)), None),
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
        )
    return found


def walk(section: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every key below a section with its dotted name; an entry of a list of sections is `name[]`."""
    for name, key in keys_of(section).items():
        inner = key.section
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", key
        for entry in get_args(key.hint):
            if isinstance(entry, type) and dataclasses.is_dataclass(entry):
                yield from walk(entry, f"{prefix}{name}[].")


def check_bounds(section: Any, prefix: str = "") -> None:
    """Every value of a section and of the sections in it. Raises UserError for the first one out of its bounds."""
    for name, key in keys_of(type(section)).items():  # type: ignore[arg-type]
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            for number, entry in enumerate(value):
                if dataclasses.is_dataclass(entry):
                    check_bounds(entry, f"{prefix}{name}[{number}].")
        rule = None if key.bounds is None or value is None else key.bounds.broken(value)
        if rule is not None:
            instead = " or null" if key.optional else ""
            given = value if isinstance(value, str) else shown(value)
            raise UserError(f"{prefix}{name} is {given}, it must {rule}{instead}")
