"""Prompts for generation reports: text from files, grouped by domain.

A `.jsonl` file holds one `{"name": …, "prompt": …}` per line, a `.txt` file is one prompt, a folder stands for its
files. The domain of a prompt is the stem of its file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.inference.arguments import text as whole_text
from nextlat_dist.inference.arguments import utf8

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Prompt:
    domain: str
    name: str
    text: str


def load_prompts(paths: list[Path], per_domain: int) -> list[Prompt]:
    """The first `per_domain` prompts of every file, in the order of `paths` and of the sorted names in a folder.

    Raises:
        UserError: a path does not exist, holds no prompt, or is not in one of the formats.
    """
    if per_domain < 1:
        raise UserError(f"prompts_per_domain is {per_domain}, but must be ≥ 1; change prompts_per_domain")
    prompts: list[Prompt] = []
    for path in paths:
        files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no {' or '.join(SUFFIXES)} file; give a prompt file or a folder of them")
        for file in files:
            read = _read(file)
            if not read:
                raise UserError(f"{file} holds no prompt; put at least one into it")
            prompts += read[:per_domain]
    if not prompts:
        raise UserError("no prompt file was given; name at least one with --prompts")
    return prompts


def _read(file: Path) -> list[Prompt]:
    if not file.is_file() or file.suffix not in SUFFIXES:
        raise UserError(
            f"{file} is not a prompt file; give an existing {' or '.join(SUFFIXES)} file or a folder of them"
        )
    text = utf8(str(file), file.read_bytes())
    if file.suffix == ".txt":
        return [Prompt(file.stem, file.stem, text)] if text.strip() else []
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, name = record["prompt"], str(record.get("name", number))
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f'{file}, line {number}, is not a record {{"name": …, "prompt": "some text"}}; correct it')
        prompts.append(Prompt(file.stem, name, whole_text(f"the prompt in line {number} of {file}", prompt)))
    return prompts
