from __future__ import annotations

import pytest

from nextlat_dist.reporting.console import printable, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ümläute, 漢字, 👩‍🔬 and ⟦marks⟧", "plain, ümläute, 漢字, 👩‍🔬 and ⟦marks⟧"),
        ("clear\x1b[2J\x07", r"clear\x1b[2J\x07"),
        ("a\x00b\x7f\x9bc", r"a\x00b\x7f\x9bc"),
        ("Mu\udcf1oz", r"Mu\xf1oz"),
        ("half \ud83d", r"half \ud83d"),
        ("exe.\u202etxt", r"exe.\u202etxt"),
        ("two\nlines\t.", r"two\x0alines\x09."),
    ],
)
def test_what_would_move_a_terminal_is_an_escape(text: str, shown: str) -> None:
    assert printable(text, keep="") == shown


def test_a_message_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\n\ttwo\x1b[31m\r")
    say("Mu\udcf1oz", error=True)
    found = capsys.readouterr()
    assert found.out == "one\n\ttwo\\x1b[31m\\x0d\n"
    assert found.err == "Mu\\xf1oz\n"
