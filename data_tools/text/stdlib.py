"""The real text that every machine has: the Python standard library, as documents and held-out prompts.

    OUTPUT/stdlib.jsonl                                {"name", "domain", "split", "text"}, a few pages each
    OUTPUT/prompts/{code,docstrings,prose}.jsonl       {"name", "prompt"}, cut from documents of the validation split

`code` is each module's source, `docstrings` the docstrings of a module, `prose` the language reference in
`pydoc_data.topics`.

Invariant: a module's docstrings are in the split of its code, documents that share a passage are in one split, and
prompts come from the validation split alone, so nothing that a prompt asks for is trained on. `nextlat-data shard
--split-field split` takes the split from here.

    nextlat-data stdlib --output corpus
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

from data_tools.text.splits import Split, hold_out, unit_hash
from nextlat_dist.errors import UserError
from nextlat_dist.files import write_whole

# Tests; installed packages; character tables, which a script generated and no one would want to see completed.
EXCLUDED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "idle_test", "encodings"}
EXCLUDED_FILES = {"pydoc_data/topics.py"}
DOMAINS = ("code", "docstrings", "prose")
PROMPTS_PER_DOMAIN = 32
PROMPT_CHARACTERS = (400, 800)
WINDOW_CHARACTERS = 1600
# Whole modules would give a small training run hundreds of rows of one topic in a row.
DOCUMENT_CHARACTERS = 4000


@dataclass(frozen=True)
class Text:
    name: str
    domain: str
    split: Split
    text: str


@dataclass(frozen=True)
class HeldOutPrompt:
    name: str
    prompt: str


def read_stdlib(root: Path) -> dict[str, str]:
    """Source of every module below `root`, by relative path, in sorted order."""
    sources: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if EXCLUDED_FOLDERS.isdisjoint(name.split("/")) and name not in EXCLUDED_FILES:
            try:
                sources[name] = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue  # a few old modules declare another encoding
    return sources


def docstrings_of(source: str) -> str:
    """All docstrings of a module, in order, with a blank line between; empty if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in old sources
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    docstrings = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(cleaned for d in docstrings if d and (cleaned := inspect.cleandoc(d).strip()))


def build(root: Path, validation_fraction: float) -> list[Text]:
    """Every document: code, docstrings and prose."""
    sources = read_stdlib(root)
    if not sources:
        raise UserError(f"there are no standard library sources in {root}; use a Python that ships them")
    # Code and docstrings of a module are decided on together. Modules borrow from each other, and some topics contain
    # others: what shares a passage goes together too.
    families: list[tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = [
        (("code", "docstrings"), {name: (source, docstrings_of(source)) for name, source in sources.items()}),
        (("prose",), {name: (text,) for name, text in sorted(topics.items())}),
    ]
    texts: list[Text] = []
    for domains, family in families:
        held = hold_out(family, validation_fraction)
        for name, parts in family.items():
            split: Split = "validation" if name in held else "train"
            documents = zip(domains, parts, strict=True)
            texts += [Text(f"{domain}/{name}", domain, split, text) for domain, text in documents if text.strip()]
    return texts


def pages(text: Text) -> list[Text]:
    """The text in documents of at most about `DOCUMENT_CHARACTERS`, cut at blank lines where there are any.

    Joined in order they give the text back.
    """
    pieces = re.split(r"(?<=\n\n)", text.text)
    lines: list[str] = []
    for piece in pieces:
        lines += piece.splitlines(keepends=True) if len(piece) > DOCUMENT_CHARACTERS else [piece]
    documents: list[str] = [""]
    for line in lines:
        if documents[-1] and len(documents[-1]) + len(line) > DOCUMENT_CHARACTERS:
            documents.append("")
        documents[-1] += line
    return [replace(text, name=f"{text.name}#{number}", text=part) for number, part in enumerate(documents)]


def cut_prompts(texts: Sequence[Text]) -> list[HeldOutPrompt]:
    """Up to `PROMPTS_PER_DOMAIN` prompts from validation documents; a second window of one only after one of each.

    A prompt starts at a line and ends before a space or a line end.
    """
    assert all(text.split == "validation" for text in texts)
    candidates: list[tuple[int, float, HeldOutPrompt]] = []
    for text in texts:
        windows = {f"{text.name}@{at}": at for at in range(0, len(text.text), WINDOW_CHARACTERS)}
        found = 0
        for name in sorted(windows, key=unit_hash):
            prompt = _prompt_at(text.text, windows[name], unit_hash(f"length of {name}"))
            if prompt is not None:
                candidates.append((found, unit_hash(name), HeldOutPrompt(name, prompt)))
                found += 1
    return [prompt for _, _, prompt in sorted(candidates, key=lambda c: c[:2])[:PROMPTS_PER_DOMAIN]]


def _prompt_at(text: str, at: int, fraction: float) -> str | None:
    """The prompt of the window at `at`, None where there is too little text; `fraction` in [0, 1) sets its length."""
    begin = at if at == 0 else text.find("\n", at) + 1
    shortest, longest = PROMPT_CHARACTERS
    window = text[begin : at + WINDOW_CHARACTERS]
    if (at and not begin) or len(window) < longest:
        return None
    end = shortest + int(fraction * (longest - shortest))
    space = re.compile(r"\s").search(window, end, longest)
    if space is None or not window[: space.start()].strip():
        return None
    return window[: space.start()]


def write_stdlib(output: Path, validation_fraction: float) -> dict[str, dict[str, int]]:
    """Write documents and prompts below `output`; returns their numbers per domain.

    Raises:
        UserError: the fraction is out of range, or this Python has no sources.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"--validation-fraction is {validation_fraction}; it must lie between 0 and 1")
    texts = build(Path(sysconfig.get_paths()["stdlib"]), validation_fraction)
    write_whole(output / "stdlib.jsonl", _jsonl(page for text in texts for page in pages(text) if page.text.strip()))
    counts: dict[str, dict[str, int]] = {}
    for domain in DOMAINS:
        of_domain = [text for text in texts if text.domain == domain]
        held = [text for text in of_domain if text.split == "validation"]
        prompts = cut_prompts(held)
        write_whole(output / "prompts" / f"{domain}.jsonl", _jsonl(prompts))
        counts[domain] = {"documents": len(of_domain), "held_out": len(held), "prompts": len(prompts)}
    return counts


def _jsonl(rows: Iterable[Text | HeldOutPrompt]) -> bytes:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()
