"""Reading files of an export, which may be foreign, damaged or edited: whatever is wrong with one is one sentence.

    fields = read_fields(directory / "config.json", "export the run again")
    fields.integer("hidden_size", minimum=1)        the value, of that type and within its bounds, or a UserError
    read_tensors(directory / "model.safetensors", "export the run again")

Invariant: every JSON and safetensors file of an export is read here. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nextlat_dist.errors import UserError

MAX_JSON_BYTES = 1 << 28  # far above the index of the largest model
_REQUIRED: Any = object()


class JsonFields:
    """A JSON object of a file, whose values are checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any], advice: str, within: str = "") -> None:
        """`within`: the keys that lead to the object, with a dot at the end."""
        self.path, self.values, self.advice, self.within = path, values, advice, within

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, *, minimum: int = 0, maximum: int = 2**53, default: Any = _REQUIRED) -> Any:
        """An integer between the bounds; `default` where the key is missing or null."""
        value = self._value(key, default)
        if value is default:
            return default
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(key, f"be a whole number from {minimum} to {maximum}")
        return value

    def number(
        self,
        key: str,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        above: float = -math.inf,
        default: Any = _REQUIRED,
    ) -> Any:
        """A finite number, at least `minimum`, more than `above` and at most `maximum`."""
        value = self._value(key, default)
        return default if value is default else self._number(key, value, minimum, maximum, above)

    def numbers(self, key: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> list[float]:
        """A list of such numbers."""
        return [self._number(f"{key}[{i}]", item, minimum, maximum) for i, item in enumerate(self.list(key))]

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self.wrong(key, "be a text")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(key, "be true or false")
        return value

    def list(self, key: str) -> list[Any]:
        value = self._value(key, _REQUIRED)
        if not isinstance(value, list):
            raise self.wrong(key, "be a list")
        return value

    def object(self, key: str) -> JsonFields:
        value = self._value(key, _REQUIRED)
        if not isinstance(value, dict):
            raise self.wrong(key, "be an object")
        return JsonFields(self.path, value, self.advice, f"{self.within}{key}.")

    def objects(self, key: str) -> Iterator[JsonFields]:
        """The objects of a list."""
        for index, item in enumerate(self.list(key)):
            yield JsonFields(self.path, {f"{key}[{index}]": item}, self.advice, self.within).object(f"{key}[{index}]")

    def wrong(self, key: str, rule: str) -> UserError:
        """The error for a value that breaks `rule`."""
        return UserError(
            f"{self.path} has {self.within}{key} {_short(self.values.get(key))}, but it must {rule}; {self.advice}"
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise UserError(f"{self.path} has no {self.within}{key}; {self.advice}")
        return default if value is None else value

    def _number(self, key: str, value: Any, minimum: float, maximum: float, above: float = -math.inf) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not is_number or not (minimum <= value <= maximum and value > above):
            bounds = [f"at least {minimum:g}"] * (minimum > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
            bounds += [f"at most {maximum:g}"] * (maximum < math.inf)
            rule = " and ".join(["be a finite number", *bounds])
            raise UserError(f"{self.path} has {self.within}{key} {_short(value)}, but it must {rule}; {self.advice}")
        return float(value)


def read_fields(path: Path, advice: str) -> JsonFields:
    """The JSON object in the file `path`.

    Args:
        advice: what to do about a file that is wrong, the end of every sentence.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes, which is no description of an export; {advice}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; {advice}") from None
    try:
        values = json.loads(text)
    except ValueError as error:  # numbers of thousands of digits among them
        raise UserError(f"{path} is no JSON ({str(error).rstrip('.')}); {advice}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; {advice}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {_short(values)}, but it must hold an object; {advice}")
    return JsonFields(path, values, advice)


def read_tensors(path: Path, advice: str) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, on the CPU, mapped into memory.

    Raises:
        UserError: the file is missing, cut short or no safetensors file.
    """
    try:
        with path.open("rb"):  # the reason in the system's words
            pass
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); {advice}") from None


def check_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], shapes: Iterator[tuple[str, tuple[int, ...]]], advice: str
) -> None:
    """Raises UserError: a tensor is missing, of another shape, or holds no floating-point numbers."""
    for name, shape in shapes:
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"{path} has no tensor {name}; {advice}")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path} has {name} of shape {list(tensor.shape)}, but its config.json asks for {list(shape)}; {advice}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path} has {name} in {kind}, but weights must be fp32, bf16, fp16 or fp64; {advice}")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
