"""Variables of a launcher in the environment: read, or answered with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.environment import check_launch, is_first_rank, launched_number

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_whole_environment(launched: pytest.MonkeyPatch) -> None:
    check_launch()
    assert [launched_number(name, 7) for name in ("RANK", "WORLD_SIZE", "NEXTLAT_NOT_SET")] == [1, 2, 7]
    assert not is_first_rank()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', it must be the number of ranks"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', it must be the number of ranks"),
        ({"WORLD_SIZE": "1"}, "RANK is 1, it must be below WORLD_SIZE=1"),
        ({"RANK": "-1"}, "RANK is '-1', it must be a whole number from 0 on"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', it must be a whole number from 0 on"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, it must be a port: at most 65535"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "RANK is set, but not MASTER_ADDR, MASTER_PORT; start ranks with"),
    ],
)
def test_one_that_is_not(launched: pytest.MonkeyPatch, changed: dict[str, str | None], sentence: str) -> None:
    for name, value in changed.items():
        launched.delenv(name) if value is None else launched.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        check_launch()


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize("changed", [{"WORLD_SIZE": "2x"}, {"RANK": "two", "WORLD_SIZE": "2"}])
def test_the_commands_say_it(
    command: str, changed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no rank could know that it is the first."""
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    assert main([command, "--config", str(CONFIG)]) == 2
    name, value = next(iter(changed.items()))
    assert f"error: the environment variable {name} is {value!r}, it must be" in capsys.readouterr().err
