"""The judge of the fuzz runs sees each kind of wrong answer."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from tests.kit.fuzz import Findings, Sandbox, faults_of, generator


def _internal_error() -> None:
    raise KeyError("a bug")


def _refused(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2


def _writes(path: Path) -> int:
    path.write_text("x")
    return 0


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (_internal_error, "the text of a traceback"),
        (lambda: sys.exit(3), "exit status 3"),
        (lambda: os.kill(os.getpid(), 15), "exit status -15"),
        (lambda: time.sleep(60), "did not end within"),
        (lambda: _refused("x" * 5000), "a message of 5,0"),
        (lambda: _refused("\x1b[31mred"), "control characters"),
        (lambda: _refused("AssertionError"), "'AssertionError' in the message"),
        (lambda: 2, "no sentence"),
        (lambda: bytearray(8 << 30), "traceback"),
    ],
    ids=["traceback", "status", "signal", "hang", "long", "control", "assert", "silent", "memory"],
)
def test_a_wrong_answer_is_a_finding(
    sandbox: Sandbox, case: Callable[[], object], fault: str, request: pytest.FixtureRequest
) -> None:
    found = Findings(budget_seconds=60)
    found.judge("case", sandbox.run(case, timeout=1 if "hang" in request.node.name else 120))
    assert len(found.wrong) == 1
    assert fault in found.wrong[0]
    with pytest.raises(AssertionError, match="1 of 1 answered wrongly"):
        found.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_handler_of_this_process_is_not_the_cases(sandbox: Sandbox, number: signal.Signals) -> None:
    """`nextlat train`, called by an earlier test of the same process, leaves one."""
    signal.signal(number, lambda *_: None)
    assert sandbox.run(lambda: os.kill(os.getpid(), number)).status == -number


def test_right_answers(sandbox: Sandbox) -> None:
    assert list(faults_of(sandbox.run(lambda: None))) == []
    assert list(faults_of(sandbox.run(lambda: _refused("one sentence")))) == []
    answer = sandbox.run(lambda: print(sys.stdin.read() + os.getcwd()), stdin=b"given ")
    assert (answer.status, answer.out) == (0, f"given {sandbox.cwd}\n")


def test_what_is_written_elsewhere_is_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    allowed, other = sandbox.cwd / "out", sandbox.cwd / "other"
    allowed.mkdir()
    before = sandbox.files()
    assert sandbox.run(lambda: _writes(allowed / "x"), writable=[allowed]).written == ()
    assert sandbox.changed(before, [allowed]) == []
    assert sandbox.run(lambda: _writes(other), writable=[allowed]).written == (f"open {str(other)!r}",)
    assert sandbox.changed(before, [allowed]) == [str(other)]
    assert sandbox.run(other.unlink, writable=[allowed]).written == (f"os.remove {str(other)!r}",)
    (allowed / "link").symlink_to(tmp_path)
    assert len(sandbox.run(lambda: _writes(allowed / "link" / "y"), writable=[allowed]).written) <= 1


def test_a_case_changes_nothing_here(sandbox: Sandbox) -> None:
    def changes() -> None:
        os.environ["FUZZ_TEST"] = "x"
        raise UserError("a message")

    where = os.getcwd()
    assert sandbox.run(changes).status == 1
    assert "FUZZ_TEST" not in os.environ
    assert os.getcwd() == where


def test_draws_are_the_same_everywhere() -> None:
    assert [generator("config", 3).randrange(1000) for _ in range(2)] == [generator("config", 3).randrange(1000)] * 2
    assert generator("config", 3).random() != generator("config", 4).random() != generator("data", 3).random()
