"""The help of every command of `nextlat-data` says what each option does and what it is without it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from data_tools.cli import _parser


def leaves(
    parser: argparse.ArgumentParser, name: str = "nextlat-data"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Commands without commands of their own."""
    kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for kind in kinds:
        for command, inner in kind.choices.items():
            yield from leaves(inner, f"{name} {command}")
    if not kinds:
        yield name, parser


ONE_OF = ("input", "source", "config")  # one of them must be given
COMMANDS = dict(leaves(_parser()))


def test_all_commands_are_there() -> None:
    found = {name.split()[1] for name in COMMANDS}
    assert found == {"stdlib", "tokenizer", "shard", "reshard", "index", "verify", "inspect", "mix-preview", "task"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_default(name: str) -> None:
    for action in COMMANDS[name]._actions:
        assert action.help, (name, action.dest)
        optional = action.option_strings and not action.required and action.nargs != 0
        if optional and action.dest not in ONE_OF:
            assert "(default: " in action.help, (name, action.dest)


def test_help_shows_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["reshard", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--record-tokens N close a record as soon as it has this many (default: 32768)" in text
