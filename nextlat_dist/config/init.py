"""A run's YAML file with every key, its value and a comment: what `nextlat init` writes.

Invariant: the file, loaded, is the preset; the comments are the descriptions of the schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from nextlat_dist.config.keys import Key, keys_of
from nextlat_dist.config.load import load_config
from nextlat_dist.config.read import read_yaml
from nextlat_dist.config.schema import RunConfig, SourceConfig, WeightChange
from nextlat_dist.config.shipped import shipped_configs
from nextlat_dist.errors import UserError
from nextlat_dist.files import write_whole

WIDTH = 120
SECTIONS = (SourceConfig, WeightChange)  # that stand in lists
SHORT = {"fineweb": "fineweb_edu_1p3b"}  # names that are shorter than the file's
HEAD = """\
# A NextLat run, every key with its value{origin}. What you delete has its default.
#   nextlat train --config FILE --dry-run     checks it and describes the run
#   nextlat train --config FILE               trains; launch/ has scripts for several ranks and hosts
"""


def presets() -> dict[str, Path]:
    """Shipped runs by name; grids of runs are none."""
    runs = {name: path for name, path in shipped_configs().items() if "base" not in read_yaml(path)}
    return {short: runs[name] for short, name in SHORT.items()} | runs


def starting_config(preset: str | None, overrides: list[str]) -> RunConfig:
    """The defaults, or a shipped run, with overrides. Raises UserError for an unknown preset or a bad override."""
    if preset is None:
        return load_config(None, overrides)
    known = presets()
    if preset not in known:
        (nearest,) = difflib.get_close_matches(preset, known, n=1, cutoff=0.0)
        raise UserError(f"--preset is {preset!r}, it must be one of {', '.join(known)}; the nearest is {nearest!r}")
    return load_config(known[preset], overrides)


def write_config(output: Path, text: str) -> None:
    """Raises UserError where something is there already."""
    if output.exists():
        raise UserError(f"--output {output} exists, it must be a new file; name another or remove it")
    write_whole(output, text)


def commented_yaml(config: RunConfig, preset: str | None = None) -> str:
    """Every key of `config`, section by section, each with its description."""
    lines = [HEAD.format(origin=f" in the preset {preset}" if preset else "").rstrip(), ""]
    for name, key in keys_of(RunConfig).items():
        value = getattr(config, name)
        if key.section is None:
            lines += [*_entry(key, value, ""), ""]
            continue
        lines += _comment((key.section.__doc__ or "").strip(), "")
        lines.append(f"{name}:")
        for inner in keys_of(key.section).values():
            lines += _entry(inner, getattr(value, inner.name), "  ")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a literal type."""
    return get_args(hint) if get_origin(hint) is Literal else ()


def _entry(key: Key, value: Any, indent: str) -> list[str]:
    allowed = choices(key.hint)
    comment = key.help + (f" ({', '.join(map(str, allowed))})" if allowed else "")
    line = f"{indent}{key.name}: {_inline(value)}"
    fits = len(line) + len(comment) + 4 <= WIDTH
    lines = [f"{line}  # {comment}"] if fits else [*_comment(comment, indent), line]
    for entry in get_args(key.hint):
        if isinstance(entry, type) and dataclasses.is_dataclass(entry):
            width = max(map(len, keys_of(entry)))
            lines += [f"{indent}#   {inner.name:{width}}  {inner.help}" for inner in keys_of(entry).values()]
    return lines


def _inline(value: Any) -> str:
    """YAML on one line."""
    plain: Any = value
    if isinstance(value, list):
        plain = [dataclasses.asdict(entry) if isinstance(entry, SECTIONS) else entry for entry in value]
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _comment(text: str, indent: str) -> list[str]:
    words = " ".join(text.split())
    return textwrap.wrap(words, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
