"""YAML as configurations need it: strict where YAML guesses, and small whatever the file holds.

    parse("training: {seed: 007}")  ->  {"training": {"seed": Plain("007")}}

An unquoted scalar stays as written (`Plain`) until the type of its key is known: `name: 007`, `name: off` and
`name: 2024-05-06` are these texts, `seed: 9007199254740993` is exact. A quoted one is text. Keys are texts.

Invariant: nothing is dropped or built in silence. A key given twice, a tag, an alias that grows the file, a nesting
deeper than any configuration: each is a `YamlError` with its line. Anchors, aliases and merge keys (`<<`) are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from nextlat_dist.reporting.number_text import LEADING_ZERO

DEEPEST = 32  # levels of nesting
LARGEST = 100_000  # values, aliases counted as often as they are used
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("int", "float", "bool", "null")}
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE, _FALSE = (
    {form for word in words for form in (word, word.title(), word.upper())}
    for words in (("true", "yes", "on"), ("false", "no", "off"))
)
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)")
_FRACTION = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)


class YamlError(ValueError):
    """The message names the line."""


@dataclass(frozen=True)
class Plain:
    """An unquoted scalar as it is written."""

    text: str

    @property
    def is_null(self) -> bool:
        return self.text in _NULL

    @property
    def truth(self) -> bool | None:
        """As a bool; None where it is none."""
        return self.text in _TRUE if self.text in _TRUE | _FALSE else None

    @property
    def value(self) -> Any:
        """What YAML 1.1 makes of it; without dates, base 60 and octal, whose text it stays."""
        if self.is_null:
            return None
        if self.truth is not None:
            return self.truth
        digits = self.text.replace("_", "")
        if _WHOLE.fullmatch(self.text) and len(digits) <= 100:
            return int(digits, 0)
        if _FRACTION.fullmatch(self.text):
            return float(digits)
        if special := _SPECIAL.fullmatch(self.text):
            return float(special[1] + special[2])
        return self.text


def parse(text: str) -> Any:
    """Mappings with texts as keys, lists, texts and `Plain`s; None for an empty document. Raises YamlError."""
    try:
        return _Document(yaml.parse(text, Loader=yaml.SafeLoader)).read()
    except yaml.YAMLError as error:
        raise YamlError(_sentence(error)) from None


def _sentence(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


@dataclass
class _Built:
    value: Any
    size: int
    height: int


class _Document:
    """One document, built from its events."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, _Built | None] = {}  # None: not finished
        self._path: list[str] = []

    def read(self) -> Any:
        next(self._events)  # the stream
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._build(next(self._events)).value
        next(self._events)  # the document's end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise YamlError(f"line {_line(event)}: a second document begins; a file holds one")
        return value

    def _build(self, event: Any) -> _Built:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise YamlError(f"line {line}: *{event.anchor} has no anchor &{event.anchor} before it")
            anchored = self._anchors[event.anchor]
            if anchored is None:
                raise YamlError(f"line {line}: *{event.anchor} stands inside of what it names")
            return _Built(_copied(self._checked(anchored, line).value), anchored.size, anchored.height)
        if len(self._path) > DEEPEST:
            raise YamlError(f"line {line}: more than {DEEPEST} levels of nesting")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            built = _Built(_scalar(event), 1, 0)
        elif isinstance(event, yaml.SequenceStartEvent):
            built = self._sequence(event)
        else:
            assert isinstance(event, yaml.MappingStartEvent)
            built = self._mapping(event)
        if event.anchor is not None:
            self._anchors[event.anchor] = built
        return self._checked(built, line)

    def _checked(self, built: _Built, line: int) -> _Built:
        if len(self._path) + built.height > DEEPEST:
            raise YamlError(f"line {line}: more than {DEEPEST} levels of nesting")
        if built.size > LARGEST:
            raise YamlError(f"line {line}: with its aliases written out this has more than {LARGEST:,} values")
        return built

    def _sequence(self, event: yaml.SequenceStartEvent) -> _Built:
        _refuse_tag(event, f"{_TAG}seq")
        built = _Built([], 1, 1)
        while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
            self._path.append(f"[{len(built.value)}]")
            entry = self._build(inner)
            self._path.pop()
            built.value.append(entry.value)
            _add(built, entry)
            self._checked(built, _line(inner))
        return built

    def _mapping(self, event: yaml.MappingStartEvent) -> _Built:
        _refuse_tag(event, f"{_TAG}map")
        built, merged = _Built({}, 1, 1), _Built({}, 0, 0)
        lines: dict[str, int] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            name = self._key(key)
            self._path.append(name)
            if name in lines:
                full = ".".join(self._path).replace(".[", "[")
                raise YamlError(f"{full!r} is given twice, in line {lines[name]} and in line {_line(key)}; keep one")
            lines[name] = _line(key)
            inner = next(self._events)
            entry = self._build(inner)
            self._path.pop()
            if name == "<<" and isinstance(key, yaml.ScalarEvent) and key.style is None:
                for source in entry.value if isinstance(entry.value, list) else [entry.value]:
                    if not isinstance(source, dict):
                        raise YamlError(f"line {_line(inner)}: << takes a mapping, or a list of them")
                    merged.value = {**source, **merged.value}  # the first of a list wins
                _add(merged, entry)
            else:
                built.value[name] = entry.value
                _add(built, entry)
            self._checked(built, _line(inner))
        built.value = {**merged.value, **built.value}
        built.size, built.height = built.size + merged.size, max(built.height, merged.height)
        return built

    def _key(self, event: yaml.Event) -> str:
        if isinstance(event, yaml.AliasEvent):
            value = self._build(event).value
            if isinstance(value, (str, Plain)):
                return value if isinstance(value, str) else value.text
        elif isinstance(event, yaml.ScalarEvent):
            value = self._build(event).value
            return value if isinstance(value, str) else str(value.text)
        raise YamlError(f"line {_line(event)}: a key must be one word, not a list or a mapping")


def _copied(value: Any) -> Any:
    """So that an override of one use of an anchor leaves the others alone."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _add(built: _Built, entry: _Built) -> None:
    built.size += entry.size
    built.height = max(built.height, 1 + entry.height)


def _scalar(event: yaml.ScalarEvent) -> str | Plain:
    tag = event.tag
    if tag is None or tag in _PLAIN_TAGS:
        return Plain(event.value) if event.style is None else str(event.value)
    _refuse_tag(event, f"{_TAG}str")
    return str(event.value)


def _refuse_tag(event: Any, own: str) -> None:
    if event.tag not in (None, "!", own):
        shown = event.tag.replace(_TAG, "!!")
        raise YamlError(f"line {_line(event)}: the tag {shown[:80]!r} is not read; leave it out")


def plain(value: Any) -> Any:
    """`value` with every `Plain` replaced by what YAML makes of it.

    Raises:
        YamlError: a number that begins with 0.
    """
    if isinstance(value, Plain):
        if LEADING_ZERO.fullmatch(value.text):
            raise YamlError(leading_zero(value.text))
        return value.value
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def leading_zero(text: str) -> str:
    """The rule that a number such as 0123 breaks."""
    digits = text.replace("_", "").lstrip("+-0") or "0"
    return f"a number must not begin with 0; write {digits}, or '{text}' in quotes for the text"
