"""A log line carries time, rank and level; what is informative only is not shown unless asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys

PROGRAM = """
from nextlat_dist.reporting.log import logger
log = logger("nextlat_dist.training.loop")
log.info("a step")
log.warning("rank %d is slow", 5)
logger("data_tools.verify").error("bad")
"""
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def lines(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "NEXTLAT_LOG")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**environment, **variables}, check=True
    )
    assert result.stdout == ""
    assert all(re.match(TIME, line) for line in result.stderr.splitlines()), result.stderr
    return [re.sub(TIME, "", line) for line in result.stderr.splitlines()]


def test_rank_level_and_module() -> None:
    assert lines(RANK="3") == [
        "rank 3 WARNING training.loop: rank 5 is slow",
        "rank 3 ERROR data_tools.verify: bad",
    ]
    assert lines()[0] == "WARNING training.loop: rank 5 is slow"


def test_more_or_less_on_demand() -> None:
    assert lines(NEXTLAT_LOG="info")[0] == "INFO training.loop: a step"
    assert lines(NEXTLAT_LOG="error") == ["ERROR data_tools.verify: bad"]
    assert lines(NEXTLAT_LOG="loud")[0] == (
        "WARNING nextlat_dist: NEXTLAT_LOG is 'loud', it must be one of debug, info, warning, error; using warning"
    )
