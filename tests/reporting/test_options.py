"""Options of the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from nextlat_dist.reporting.options import add_fields, add_outputs, given, integers, numbers


@dataclass(frozen=True)
class Plan:
    length: int = field(metadata={"help": "of a document"})
    rate: float = 0.5
    kind: Literal["flat", "deep"] = "flat"
    sizes: tuple[int, ...] = (1, 8)
    draft_lengths: tuple[int, ...] = field(
        default=(0, 1), metadata={"parse": integers, "metavar": "0..3", "flag": "--draft-length"}
    )
    limit: int | None = None
    quick: bool = field(default=False, metadata={"help": "seconds instead of minutes"})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_fields(made, Plan)
    return made


def test_lists() -> None:
    assert integers("0..3,8") == [0, 1, 2, 3, 8]
    assert numbers("0,0.6,1") == [0.0, 0.6, 1.0]


def test_fields_become_options() -> None:
    typed = [
        "--length",
        "3",
        "--kind",
        "deep",
        "--sizes",
        "2",
        "4",
        "--draft-length",
        "0..2,5",
        "--limit",
        "7",
        "--quick",
    ]
    found = given(parser().parse_args([*typed, "--quick"]), Plan)
    assert found == {
        "length": 3,
        "kind": "deep",
        "sizes": [2, 4],
        "draft_lengths": [0, 1, 2, 5],
        "limit": 7,
        "quick": True,
    }
    assert given(parser().parse_args(["--length", "3"]), Plan) == {"length": 3}


def test_help_shows_the_defaults() -> None:
    text = " ".join(parser().format_help().split())
    for shown in ("of a document", "(default: 0.5)", "(default: flat)", "(default: 1 8)", "0..3 (default: 0,1)"):
        assert shown in text
    assert "None" not in text
    other = argparse.ArgumentParser()
    add_fields(other, Plan, names=["rate"], defaults=Plan(1, rate=0.25))
    assert "(default: 0.25)" in other.format_help()
    assert "--length" not in other.format_help()


@pytest.mark.parametrize("typed", ["", "--length x", "--length 1 --kind other"])
def test_refused(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(typed.split())
    assert "error" in capsys.readouterr().err


def test_outputs() -> None:
    made = argparse.ArgumentParser()
    add_outputs(made, pictures="PNGs")
    assert vars(made.parse_args([])) == {"json": None, "pictures": None}
    assert vars(made.parse_args(["--json", "a.json", "--pictures", "b"])) == {
        "json": Path("a.json"),
        "pictures": Path("b"),
    }
    add_outputs(made := argparse.ArgumentParser())
    assert "--pictures" not in made.format_help()
