"""A single value of a configuration, converted to the type of its key.

Invariant: a number is the one that is written: `9007199254740993`, quoted or not, is not rounded by way of a float.
"""

from __future__ import annotations

import math
from typing import Any

from nextlat_dist.config.keys import shown
from nextlat_dist.config.yaml_text import Plain, leading_zero
from nextlat_dist.errors import UserError
from nextlat_dist.reporting.number_text import LEADING_ZERO, MOST_DIGITS, number_of


def convert_scalar(value: Any, hint: type, key: str) -> Any:
    """`value`, as YAML or Python has it, as an int, float, bool or str.

    Raises:
        UserError: it is of another type, not finite, or a text that no file system and no encoding takes.
    """
    if hint is str and isinstance(value, Plain) and not value.is_null:
        value = value.text
    elif isinstance(value, Plain):
        if hint in (int, float) and LEADING_ZERO.fullmatch(value.text):
            raise UserError(f"{key} is {value.text}, {leading_zero(value.text)}")
        # The text of a number is more exact than what YAML makes of it; null and true are none.
        of_text = value.is_null or value.truth is not None or hint is bool
        value = value.value if of_text else value.text
    if hint in (int, float) and isinstance(value, str):
        number = number_of(value)
        if number is None:
            raise UserError(f"{key} is {shown(value)}, it must be a number")
        value = number
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 10**MOST_DIGITS:
        value = int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 10**300 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} is {shown(value)}, it must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value!r}, it must be finite")
    if isinstance(value, str) and ("\0" in value or not _is_encodable(value)):
        raise UserError(f"{key} is {shown(value)}, it must be text without NUL and half characters")
    return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
