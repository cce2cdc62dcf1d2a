"""Paths and URLs in a configuration: what stands for something else in them, and what is never written down.

`~`, `$NAME` and `${NAME}` in a path, and `${NAME}` in a URL, are replaced when a user's configuration is loaded: no
shell has seen a YAML file. A URL keeps the form in which it was written, and only that is saved, printed and sent: the
password in `https://me:${PASSWORD}@host/data` stays in the environment. One that is written out stays in this process;
what is saved has `***` in its place (`errors.without_secrets`).

Invariant: only `load_config` replaces anything. A configuration that came with a checkpoint cannot read variables of
the user's and send them to the host that it names.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from nextlat_dist.config.keys import keys_of, shown
from nextlat_dist.errors import UserError, without_secrets

LONGEST_NAME, LONGEST_PATH = 255, 4096  # Linux's limits.h
_NAME = re.compile(r"\$(?:\{(\w+)\}|(\w+))|\$\$")
_NAME_IN_URL = re.compile(r"\$\{(\w+)\}")


class Url(str):
    """A URL with its variables replaced. `written`: with their names, as the user wrote it."""

    written: str

    def __new__(cls, url: str, written: str) -> Url:
        made = super().__new__(cls, url)
        made.written = written
        return made

    def __reduce__(self) -> tuple[type[Url], tuple[str, str]]:
        return Url, (str(self), self.written)

    def __deepcopy__(self, _: Any) -> Url:
        return self


def locate(section: Any, prefix: str = "") -> None:
    """Replace what stands for something else in every path and URL below a section.

    Raises:
        UserError: a variable is not set, or there is no such user.
    """
    for name, key in keys_of(type(section)).items():  # type: ignore[arg-type]
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            locate(value, f"{prefix}{name}.")
        elif key.is_location and isinstance(value, str):
            setattr(section, name, located(value, f"{prefix}{name}"))
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                if dataclasses.is_dataclass(entry):
                    locate(entry, f"{prefix}{name}[{number}].")


def located(text: str, key: str, environment: Mapping[str, str] | None = None) -> str:
    """One path or URL; `key` is named in errors."""
    variables = os.environ if environment is None else environment

    def value(name: str) -> str:
        if name not in variables:
            raise UserError(
                f"{key} is {shown(text)}, but the environment variable {name} is not set; set it, or write the value "
                f"({'%24' if is_url else '$$'} is a $ that stays)"
            )
        return variables[name]

    is_url = "://" in text
    if is_url:
        scheme, _, rest = text.partition("://")
        end = min((rest.find(mark) for mark in "/?#" if mark in rest), default=len(rest))
        user, at, _ = rest[:end].rpartition("@")
        # Of user and password, what would end them there is quoted; what is quoted already stays.
        user = _NAME_IN_URL.sub(lambda found: quote(value(found[1]), safe="%"), user)
        rest = _NAME_IN_URL.sub(lambda found: value(found[1]), rest[rest[:end].rfind("@") + 1 :])
        url = f"{scheme}://{user}{at}{rest}"
        return Url(url, text) if url != text else text
    path = _NAME.sub(lambda found: "$" if found[0] == "$$" else value(found[1] or found[2]), text)
    if path.startswith("~"):
        home = os.path.expanduser(path)
        if home == path:
            raise UserError(f"{key} is {shown(text)}, but there is no such user; write the whole path")
        path = home
    if max(len(os.fsencode(name)) for name in path.split("/")) > LONGEST_NAME or len(path) >= LONGEST_PATH:
        raise UserError(f"{key} is {shown(text)}, a path must have names of at most {LONGEST_NAME} bytes; shorten it")
    return path


def without_secret_values(value: Any) -> Any:
    """Mappings, lists and texts of a configuration as they may be saved, printed and sent."""
    if isinstance(value, dict):
        return {name: without_secret_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secret_values(item) for item in value]
    if isinstance(value, str):
        return without_secrets(value.written if isinstance(value, Url) else value)
    return value


def secret_urls(section: Any) -> list[str]:
    """URLs below a section that are not saved as they are."""
    found = []
    for name, key in keys_of(type(section)).items():  # type: ignore[arg-type]
        value = getattr(section, name)
        if key.is_location and isinstance(value, str) and without_secrets(value) != value:
            found.append(str(value))
        for entry in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(entry):
                found += secret_urls(entry)
    return found
