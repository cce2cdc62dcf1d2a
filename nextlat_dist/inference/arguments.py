"""Arguments of decoding, checked where they come in: each function returns the value as decoding uses it.

Every error is a sentence with the value, the rule and the name to change.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch

from nextlat_dist.errors import UserError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64


def whole(name: str, value: object, least: int, note: str = "") -> int:
    """A whole number from `least` on (numpy's and 0-dimensional tensors of integers are ones, too)."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        what = "a whole number" if number is None else "a number"
        raise UserError(f"{name} is {value!r}, but must be {what} ≥ {least}{note}; change {name}")
    return number


def real(name: str, value: object) -> float:
    """A number that is not a boolean; NaN and infinities are for the caller to judge."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} is {value!r}, but must be a number; change {name}")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name} is {value!r}, which is too large for a number; change {name}") from None


def ids(name: str, values: object, known: int, where: str) -> list[int]:
    """Token ids of a vocabulary of `known`; `where` names it in the error."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise UserError(f"{name} is {values!r}, but must be a text or a list of token ids; change it")
    found = []
    for position, value in enumerate(values):
        try:
            found.append(operator.index(value))
        except TypeError:
            raise UserError(
                f"{name} holds {value!r} at position {position}, but must be a text or a list of token ids; change it"
            ) from None
    if found and not 0 <= min(found) <= max(found) < known:
        raise UserError(
            f"{name} holds token ids from {min(found)} to {max(found)}, but the model knows 0 to {known - 1}; encode "
            f"it with the tokenizer of {where}"
        )
    return found


def prompts(values: object) -> Sequence[Any]:
    """The prompts of a call; one text, or the ids of one, would pass for a list of prompts."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        shown = repr(values) if len(repr(values)) < 60 else f"{repr(values)[:57]}…"
        raise UserError(f"prompts is {shown}, but must be a list of prompts; for a single one give a list of one")
    return list(values)


def stop_token_ids(values: object) -> frozenset[int]:
    if isinstance(values, Iterable) and not isinstance(values, str | bytes):
        try:
            return frozenset(operator.index(value) for value in values)
        except TypeError:
            pass
    raise UserError(f"stop_token_ids is {values!r}, but must be a list of token ids; change stop_token_ids")


def stop_strings(values: object) -> tuple[str, ...]:
    listed = list(values) if isinstance(values, Collection) and not isinstance(values, str | bytes) else None
    if listed is None or not all(isinstance(value, str) and value for value in listed):
        raise UserError(f"stop_strings is {values!r}, but must be a list of texts that are not empty")
    return tuple(listed)


def text(name: str, value: str) -> str:
    """A text that UTF-8 can write: no half of a character, as a byte that is not UTF-8 becomes on a command line."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python hands on a byte that it could not decode
            what = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8,"
        else:
            what = f"half a character (a lone surrogate, U+{code:04X})"
        raise UserError(f"{name} holds {what} at position {error.start}; give it as UTF-8") from None
    return value


def utf8(name: str, raw: bytes) -> str:
    """The text of bytes in UTF-8, without its byte order mark."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} is UTF-16, but must be UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} holds the byte 0x{raw[error.start]:02x} in line {line}, which is not UTF-8; convert it to UTF-8"
        ) from None


def dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A floating type, given as torch's or by its name."""
    if value is None:
        return None
    found = DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype is {value!r}, but must be one of {', '.join(DTYPES)}; change dtype")
    return found


def device(value: torch.device | str | None) -> str | None:
    """A device that is there."""
    if value is None:
        return None
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        raise UserError(f"device is {value!r}, but must be cpu, cuda or cuda:N; change device") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {str(found)!r}, but this machine has {torch.cuda.device_count()} GPUs that CUDA can use; "
            "change device"
        )
    return str(found)
