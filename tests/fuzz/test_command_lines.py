"""Every command with arguments changed at random: done, or refused with one sentence; nothing else is touched.

And the opposite: an error inside of a command, planted wherever it is, keeps its traceback and ends with status 1.
"""

from __future__ import annotations

import argparse
import inspect
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from data_tools.cli import main as data_main
from nextlat_dist.cli import main
from nextlat_dist.files import temporary_name
from tests.kit.command_lines import LINES, commands, words_of, write_inputs
from tests.kit.fuzz import Answer, Findings, Sandbox, cases, generator, warm
from tests.kit.pages import ROOT
from tests.kit.system import access_as_written

COUNT = 500
SECONDS = 400  # of a processor, all cases together
VALUES = [
    *("", "0", "-1", "1", "2", "3", "1.5", "1e1", "1_0", "0x2", "nan", "inf", "-inf", "1e300", "1e-300", "abc", "٣"),
    *("9" * 30, "9" * 5000, "-" + "9" * 30, "1..3", "3..1", "0,1", "0,x", ",", "=", "a=", "=a", "a=b=c", "a=export:x"),
    *("nowhere", "nowhere/at/all", ".", "..", "/", "~", "text.txt", "text.txt/x", "run.yaml", "data", "data/train"),
    *("export", "run", "run/checkpoints", "labels/test", "t.model", "somebody.tar", "notes", "prompts", "broken.yaml"),
    *("http://127.0.0.1:1/x", "s3://a:b@c/d", "hf:no/such", "file:///nowhere", "-", "--", "-x", "--no-such-option"),
    *("\x1b[31mred", "a\nb", "a\tb", "caf\udce9", "\u202e", "x" * 300, "*", "a*[", "{000..002}", "%s", "{0}", "\\"),
]
OUTPUTS = ["out/new", "out/a/b/c", "out", "notes", "notes/mine.txt/x", "text.txt", "nowhere/new", "", "."]


def is_output(word: str) -> bool:
    return word in ("--output", "--json", "--png", "--pictures")


def changed(words: Sequence[str], parser: argparse.ArgumentParser, draw: random.Random) -> list[str]:
    """One to three changes; values of what is written stay below `out`, or name what must not be replaced."""
    found = list(words)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        options = [word for action in parser._actions for word in action.option_strings if word not in ("-h", "--help")]
        kind = draw.randrange(7)
        if kind == 0 and len(found) > 1:
            del found[draw.randrange(1, len(found))]
        elif kind == 1:
            found.insert(draw.randrange(1, len(found) + 1), draw.choice(VALUES))
        elif kind == 2 and options:
            option = draw.choice(options)
            found += [option, draw.choice(OUTPUTS if is_output(option) else VALUES)]
        elif kind == 3:
            rest = found[1:]
            draw.shuffle(rest)
            found = [found[0], *rest, *rest[-1:]]
        else:
            number = draw.randrange(1, len(found)) if len(found) > 1 else 0
            if not found[number].startswith("--"):
                found[number] = draw.choice(OUTPUTS if is_output(found[number - 1]) else VALUES)
            elif number + 1 < len(found):
                found[number + 1] = draw.choice(OUTPUTS if is_output(found[number]) else VALUES)
    return found


def program(command: str) -> Callable[[list[str]], int]:
    return data_main if command.startswith("nextlat-data ") else main


def writable(words: Sequence[str], sandbox: Sandbox) -> list[Path]:
    """`out`, and what the line itself names as its output."""
    named = [words[number + 1] for number in range(len(words) - 1) if is_output(words[number])]
    named += [word.partition("=")[2] for word in words if is_output(word.partition("=")[0])]
    paths = [sandbox.cwd / name for name in named if name]
    paths += [folder for path in paths for folder in path.parents if not folder.exists()]  # made on the way
    return [sandbox.cwd / "out", *paths, *(temporary_name(path) for path in paths if path.name)]


def warm_all() -> None:
    warm("nextlat_dist.training.dry_run", "nextlat_dist.doctor.examine", "nextlat_dist.experiments.ablate")
    warm("nextlat_dist.huggingface.export", "nextlat_dist.inference.loading", "nextlat_dist.inference.terminal")
    warm("nextlat_dist.calibration.calibrate", "nextlat_dist.evaluation.run_report.command", "data_tools.text.command")
    warm("wandb")  # makes its temporary folders when it is imported, and transformers imports it to load a model


def test_every_command_has_a_line() -> None:
    assert set(LINES) == set(commands())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_line_is_answered(tmp_path: Path) -> None:
    warm_all()
    sandbox, found = Sandbox(tmp_path), Findings(SECONDS, statuses=(0, 1, 2))
    write_inputs(sandbox.cwd)
    names = sorted(LINES)
    parsers = commands()
    for number in cases("line", COUNT):
        draw = generator("line", number)
        command = names[number % len(names)]
        start = command.split()[1:]
        words = changed(words_of(command)[len(start) - 1 :], parsers[command], draw)
        words = [*start[:-1], *words]
        before, may_write = sandbox.files(), writable(words, sandbox)
        run = partial(program(command), words)
        answer = sandbox.run(run, writable=may_write, stdin=b"What is it?\n\n")
        # A file that is named is replaced; a folder is written into, and what was in it stays as it was.
        changed_paths = sandbox.changed(before, [sandbox.cwd / "out"])
        lost = [path for path in changed_paths if path in before and Path(path) not in may_write]
        made = sandbox.changed(before, may_write)
        found.judge(f"line:{number} {command.split()[0]} {words}", answer, sorted({*lost, *made}))
        shutil.rmtree(sandbox.cwd / "out")
        (sandbox.cwd / "out").mkdir()
    found.check()


BAD_PATHS = {
    "too long": "x" * 300,
    "nobody's": "~nobody-of-this-name/x",
    "closed": "closed/x",
    "below a file": "text.txt/x",
}


def lines_with(bad: str, command: str, sandbox: Sandbox) -> Iterator[list[str]]:
    """The command's line with `bad` in place of each path in turn, in what is around it (`a=PATH:0.5`)."""
    words = words_of(command)
    for number, word in enumerate(words):
        path = word.partition("=")[2].partition(":")[0] or word
        if path.startswith("out/") or (sandbox.cwd / path).exists():
            yield [*words[:number], word.replace(path, bad, 1), *words[number + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD_PATHS)
def test_a_path_that_cannot_be_used_is_named(bad: str, tmp_path: Path) -> None:
    """Each path of every command, for a user whom file modes bind."""
    warm_all()
    sandbox, found = Sandbox(tmp_path), Findings(SECONDS, statuses=(0, 1, 2))
    write_inputs(sandbox.cwd)
    (sandbox.cwd / "closed").mkdir()
    (sandbox.cwd / "closed/x").write_text("{}")
    (sandbox.cwd / "closed").chmod(0)
    tried = 0
    for command in sorted(LINES):
        for words in lines_with(BAD_PATHS[bad], command, sandbox):
            tried += 1
            with access_as_written():
                answer = sandbox.run(partial(program(command), words), writable=[sandbox.cwd], stdin=b"What?\n\n")
            found.judge(f"{bad} {words}", answer, [])
    (sandbox.cwd / "closed").chmod(0o700)
    assert tried > len(LINES)
    found.check()


class Planted(Exception):
    """An error that no code of ours knows."""


def planted(run: Callable[[], Any], call: int) -> Any:
    """Run with an error at the beginning of the n-th call of a function of the project's."""
    left = call

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event == "call" and is_ours(frame.f_code):
            left -= 1
            if left == 0:
                raise Planted(f"in {frame.f_code.co_qualname}")

    def traced() -> Any:
        sys.settrace(trace)
        try:
            return run()
        finally:
            sys.settrace(None)

    return traced()


def is_ours(code: CodeType) -> bool:
    """A function of the packages, below the command lines' own; not a module or a class that is being made."""
    file = code.co_filename
    ours = file.startswith((str(ROOT / "nextlat_dist"), str(ROOT / "data_tools")))
    outside = file.endswith(("/cli.py", "/reporting/options.py", "/number_text.py")) or "add_" in code.co_name
    return ours and not outside and bool(code.co_flags & inspect.CO_OPTIMIZED)


def answer_with_error(command: str, call: int, sandbox: Sandbox) -> Answer:
    return sandbox.run(
        partial(planted, partial(program(command), words_of(command)), call),
        writable=[sandbox.cwd],
        stdin=b"What?\n\n",
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    warm_all()
    sandbox = Sandbox(tmp_path_factory.mktemp("planted"))
    write_inputs(sandbox.cwd)
    return sandbox


@pytest.mark.parametrize("command", sorted(LINES))
def test_an_internal_error_keeps_its_traceback(command: str, inputs: Sandbox) -> None:
    """At the first call below the command's own function, and a little deeper."""
    for call in (1, 5):
        answer = answer_with_error(command, call, inputs)
        assert answer.status == 1, (call, answer)
        assert "Traceback (most recent call last)" in answer.err
        assert "Planted: in " in answer.err
