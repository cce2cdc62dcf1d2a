"""The help of every command of `nextlat-data` says what each option does and what it is without it."""

from __future__ import annotations

import pytest

from data_tools.cli import _parser
from tests.kit.parsers import leaves, undescribed

ONE_OF = ("input", "source", "config")  # one of them must be given
COMMANDS = dict(leaves(_parser(), "nextlat-data"))


def test_all_commands_are_there() -> None:
    found = {name.split()[1] for name in COMMANDS}
    assert found == {"stdlib", "tokenizer", "shard", "reshard", "index", "verify", "inspect", "mix-preview", "task"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_default(name: str) -> None:
    assert set(undescribed(COMMANDS[name])) <= set(ONE_OF)


def test_help_shows_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["reshard", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--record-tokens N close a record as soon as it has this many (default: 32768)" in text
