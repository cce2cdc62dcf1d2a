"""Two thousand configurations and overrides, changed at random: each is read, or refused with one sentence."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nextlat_dist.cli import main
from nextlat_dist.config.keys import walk
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.config.shipped import shipped_configs
from tests.kit.fuzz import Findings, Sandbox, cases, generator, warm
from tests.kit.pages import ROOT

COUNT = 2000
SECONDS = 240  # of a processor, all cases together
KEYS = [name.replace("[]", ".0") for name, _ in walk(RunConfig)]
SCALARS = [
    *(
        "",
        "~",
        "null",
        "true",
        "no",
        "on",
        "y",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "007",
        "0123",
        "08",
        "0x10",
        "0x_",
        "0b2",
    ),
    *("1_000", "1_", "_1", "1e3", "1e-3", "1e300", "-1e300", "1e400", "1e-400", ".5", "5.", ".", "nan", ".nan", ".inf"),
    *(
        "-.inf",
        "1:30",
        "1:30:00",
        "2024-05-06",
        "2024-99-99",
        "2024-05-06T01:02:03Z",
        "12:61:61",
        "=",
        "<<",
        "!!bool x",
    ),
    *("!!int x", "!!float 1", "!!binary x", "!!timestamp 2024-99-99", "!!python/name:os.system", "!x y", "&a 1", "*a"),
    *("[1, 2]", "[]", "{}", "{a: 1}", "[[[[1]]]]", "{a: {b: {c: 1}}}", "[1, [2", "{a", "'", '"', "'x", '"\\x1b[31m"'),
    *('"\\0"', '"\\uD800"', '"\\U0001F600"', "x: y", "a #b", "#", "- 1", "? 1", "| ", ">-", "%a", "@a", "`a", "a\tb"),
    *("~/x", "~nobody-here/x", "$HOME/x", "$NO_SUCH_VARIABLE", "${", "$$", "s3://b/c", "http://a:b@127.0.0.1:1/c?d=e"),
    *(
        "file:///x",
        "file://host/x",
        "ftp://x/y",
        "gs://a:b@c/d",
        "../../..",
        "/",
        "/dev/null",
        "x/" * 300,
        "\u202e",
        "é",
    ),
    *("9" * 20, "9" * 400, "9" * 5000, "-" + "9" * 400, "0." + "1" * 400, "x" * 5000, "1e" + "9" * 50, "٣", "１２"),
    *("no_such_module:Entry", "os:system", "next_token", "mtp", "bf16", "concat", "pad", "never", "must", "cosine"),
]


def scalar(draw: random.Random) -> str:
    return draw.choice(SCALARS)


def bomb(draw: random.Random) -> str:
    width, depth = draw.randint(2, 12), draw.randint(2, 9)
    lines = ["x0: &x0 [" + ", ".join(["v"] * width) + "]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines) + f"\n{draw.choice(KEYS)}: *x{depth - 1}\ndeepspeed: {{a: *x{depth - 1}}}\n"


def deep(draw: random.Random) -> str:
    opening = draw.choice(["[", "{a: ", "- ", "? "])
    return f"{draw.choice(KEYS).partition('.')[0]}: {opening * draw.choice([5, 31, 33, 1000, 20_000])}"


def replaced_value(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    places = [number for number, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    if not places:
        return text
    number = draw.choice(places)
    lines[number] = lines[number].partition(":")[0] + ": " + scalar(draw)
    return "\n".join(lines) + "\n"


def changed_line(text: str, draw: random.Random) -> str:
    lines = text.splitlines() or [""]
    number = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        lines.insert(number, lines[draw.randrange(len(lines))])  # often a key twice
    elif kind == 1:
        del lines[number]
    elif kind == 2:
        lines[number] = " " * draw.randint(0, 9) + lines[number].strip()
    elif kind == 3:
        lines.insert(number, f"{draw.choice(KEYS).rpartition('.')[2]}: {scalar(draw)}")
    elif kind == 4:
        lines[number] = lines[number].replace(":", draw.choice(["", "::", ": [", ": {", ":\t", ": &a ", ": *a"]), 1)
    else:
        lines.insert(number, draw.choice(["---", "...", "%YAML 9.9", "\ufeff", "<<: *a", "\t", "a: &a {b: *a}"]))
    return "\n".join(lines) + "\n"


def whole_tree(_: str, draw: random.Random) -> str:
    """A few random keys as sections, often right ones."""
    sections: dict[str, list[str]] = {}
    for key in draw.sample(KEYS, 6):
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {scalar(draw)}" if name else "")
    return "".join(
        f"{name}:{'' if any(body) else ' ' + scalar(draw)}\n" + "\n".join(body) + "\n"
        for name, body in sections.items()
    )


CHANGES: list[Callable[[str, random.Random], str]] = [
    *[replaced_value] * 4,
    *[changed_line] * 4,
    whole_tree,
    lambda _, draw: bomb(draw),
    lambda _, draw: deep(draw),
    lambda text, draw: text[: draw.randrange(len(text) + 1)],
    lambda text, draw: text * 2,
]


def as_bytes(text: str, draw: random.Random) -> bytes:
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    kind = draw.randrange(20)
    if kind == 0 and content:
        for _ in range(draw.randint(1, 5)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif kind == 1:
        return text.encode(draw.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]), "replace")
    elif kind == 2:
        content[draw.randrange(len(content) + 1) : 0] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
    return bytes(content)


def override(draw: random.Random) -> str:
    key = draw.choice(KEYS)
    kind = draw.randrange(12)
    if kind == 0:
        key = key[: draw.randrange(len(key) + 1)]
    elif kind == 1:
        key += draw.choice([".", ".x", "..y", "[0]", " ", "\u0000x", "=", ".0.name"])
    elif kind == 2:
        return draw.choice(
            ["=", "==", "x", "", "a=b=c", "key = 1", "{}", "training", "training=", ".=1", "a.b.c.d.e=1"]
        )
    return f"{key}={scalar(draw)}".replace("\0", "")


def command_of(draw: random.Random, path: str) -> list[str]:
    overrides = [override(draw) for _ in range(draw.choice([0, 0, 1, 1, 2, 3]))]
    cut = draw.randrange(len(overrides) + 1)
    kind = draw.randrange(10)
    if kind < 7:
        return ["train", *overrides[:cut], "--config", path, "--dry-run", *overrides[cut:]]
    if kind == 7:
        return ["init", *overrides]
    if kind == 8:
        return ["doctor", "--quick", "--config", path, *overrides]
    return ["ablate", "--config", path, "--output", "out/grid", "--seeds", draw.choice(["0", "1,2", "x", "0..3"])]


def source_text(draw: random.Random, texts: list[str]) -> str:
    text = draw.choice(texts)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        text = draw.choice(CHANGES)(text, draw)
    return text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_configuration_is_answered(tmp_path: Path) -> None:
    warm("nextlat_dist.training.dry_run", "nextlat_dist.doctor.examine", "nextlat_dist.experiments.ablate")
    warm("nextlat_dist.objective.catalogue", "nextlat_dist.model.predictors", "nextlat_dist.config.init")
    sandbox, found = Sandbox(tmp_path), Findings(SECONDS, statuses=(0, 1, 2))
    shutil.copytree(ROOT / "tests/fixtures/formats/data/train", sandbox.cwd / "data")
    grids = [path for path in shipped_configs().values() if "base:" in path.read_text()]
    # A grid that is read would be run; so none that is whole is among the texts.
    texts = [path.read_text() for path in shipped_configs().values() if path not in grids]
    texts += [text.replace("base:", "bas:") for text in (path.read_text() for path in grids)]
    texts += ["", "data: {train: data}\nmodel: {vocab_size: 4096}\n"]
    out, path = sandbox.cwd / "out", sandbox.cwd / "run.yaml"
    out.mkdir()
    for number in cases("config", COUNT):
        draw = generator("config", number)
        content = as_bytes(source_text(draw, texts), draw)
        path.write_bytes(content)
        words = command_of(draw, "run.yaml")
        before = sandbox.files()
        # doctor tries to write where the run would; what it leaves is looked for below.
        may_try = [sandbox.cwd] if words[0] == "doctor" else [out]
        answer = sandbox.run(partial(main, words), writable=may_try)
        found.judge(f"config:{number} {os.fspath(path)} {words}", answer, sandbox.changed(before, [out]))
    found.check()
