"""The project's Markdown pages, read into code blocks, commands, headings and links.

Every code block names its language. An HTML comment directly above a block says how the tests treat it:

    <!-- not run: REASON[; words] --> not executed; REASON is one of REASONS; commands still have to parse
    <!-- run with: A => B; C => D --> executed with those pieces of text replaced by smaller ones
    <!-- file: NAME -->               written to that file, for the commands after it
    <!-- output -->                   a `text` block: what the command in the block before it prints

A block without a comment is executed as it stands (bash, python) or parsed (yaml).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
LANGUAGES = ("bash", "python", "yaml", "toml", "text")
REASONS = {
    "gpu": "needs a GPU",
    "cluster": "needs several hosts, a scheduler or a cluster",
    "internet": "needs the internet",
    "software": "needs software that is not among the project's dependencies",
    "install": "installs into the current environment",
    "long": "takes minutes or hours",
    "interactive": "waits for a person at a terminal",
}
_COMMENT = re.compile(r"<!--\s*(?P<text>.*?)\s*-->$")


@dataclass(frozen=True)
class Block:
    """One fenced code block."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str
    not_run: str | None  # a key of REASONS
    replacements: tuple[tuple[str, str], ...]
    file: str | None
    is_output: bool

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def small_code(self) -> str:
        """The code at the size of a test."""
        code = self.code
        for old, new in self.replacements:
            assert old in code, f"{self.name}: `{old}` of `run with` is not in the block"
            code = code.replace(old, new)
        return code

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command line, without comments, settings of variables, and what follows a pipe."""
        joined = self.code.replace("\\\n", " ")
        lines = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [words for line in lines if (words := _without_variables(line))]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The code blocks of a page, in order."""
    found: list[Block] = []
    comment = ""
    lines = enumerate(page.read_text().splitlines(), start=1)
    for number, line in lines:
        if line.startswith("```"):
            code: list[str] = []
            for _, inside in lines:
                if inside.startswith("```"):
                    break
                code.append(inside)
            found.append(_block(page, number + 1, line.removeprefix("```"), "\n".join(code) + "\n", comment))
        match = _COMMENT.match(line)
        comment = match["text"] if match else ""
    return tuple(found)


def _block(page: Path, line: int, language: str, code: str, comment: str) -> Block:
    name = f"{page.relative_to(ROOT).as_posix()}:{line}"
    assert language in LANGUAGES, f"{name}: a code block of language {language!r}; it must be one of {LANGUAGES}"
    kind, _, value = comment.partition(":")
    reason: str | None = None
    replacements: tuple[tuple[str, str], ...] = ()
    if kind == "not run":
        reason = re.split("[,;]", value)[0].strip()
        assert reason in REASONS, f"{name}: `not run: {reason}`; the reasons are {', '.join(REASONS)}"
    elif kind == "run with":
        pairs = [tuple(part.strip() for part in pair.split("=>")) for pair in value.split(";")]
        assert all(len(pair) == 2 for pair in pairs), f"{name}: `{comment}` is not of the form A => B; C => D"
        replacements = tuple((old, new) for old, new in pairs)
    else:
        assert kind in ("", "output", "file"), f"{name}: unknown comment `{comment}` above a code block"
    file = value.strip() if kind == "file" else None
    return Block(page, line, language, code, reason, replacements, file, kind == "output")


def text_without_code(page: Path) -> str:
    """The page without its code blocks and inline code, where what looks like a link is none."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", text_without_code(page))


@cache
def anchors(page: Path) -> set[str]:
    """What `#…` can name on a page: GitHub's form of its headings."""
    outside_code = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", outside_code, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.add(plain)
    return found
