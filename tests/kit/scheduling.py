"""Which tests run at one time where pytest-xdist has several processes: whole files, and of files with ranks one.

Ranks of one test wait for one another: two such tests on a few cores take far longer than one after the other.
"""

from __future__ import annotations

import re
from typing import Any

from xdist.scheduler import LoadFileScheduling

RANKS = re.compile(
    r"tests/(training/|checkpoint/test_kill\.|launch/test_(two_hosts|kills)\.|model/|objective/|parallel/)"
)
SINGLE = re.compile(r"tests/launch/test_reproduce\.")  # its tests share nothing and are the longest of all


class OneFileOfRanks(LoadFileScheduling):  # type: ignore[misc]
    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by number of tests, which puts the longest last

    def _split_scope(self, nodeid: str) -> str:
        if SINGLE.match(nodeid):
            return nodeid
        return "ranks" if RANKS.match(nodeid) else super()._split_scope(nodeid)
