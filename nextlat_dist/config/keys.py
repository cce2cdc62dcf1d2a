"""Keys of a configuration: `Annotated[type, "what it is", bounds]`, read at run time.

The sentence is the key's only description: `nextlat init` writes it as a comment and the configuration reference prints
it. The bounds are checked wherever a value of the section is, so a key cannot be added without them: a test walks
every numeric key of the schema.

    num_layers: Annotated[int, "decoder layers", POSITIVE] = 8
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from nextlat_dist.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Which values a key may have.

    Attributes:
        rule: completes the sentence "X is 0, it must …".
        holds: of a value that has the key's type; null is never asked about.
    """

    rule: str
    holds: Callable[[Any], bool]


POSITIVE = Bounds("be positive", lambda value: value > 0)
NOT_NEGATIVE = Bounds("not be negative", lambda value: value >= 0)
ANY = Bounds("be a number", lambda _: True)  # a rule between values decides (rules.py)


@dataclass(frozen=True)
class Key:
    """A field of a section. `default` is dataclasses.MISSING for a key that must be given."""

    name: str
    hint: Any
    help: str
    bounds: Bounds | None
    default: Any

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
        if key.bounds is not None and value is not None and not key.bounds.holds(value):
            instead = " or null" if key.optional else ""
            raise UserError(f"{prefix}{name} is {value}, it must {key.bounds.rule}{instead}")
