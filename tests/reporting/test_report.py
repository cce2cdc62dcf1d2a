"""Tables, the content of a report, progress."""

from __future__ import annotations

import json
import platform

import pytest

from nextlat_dist.reporting import report
from nextlat_dist.reporting.console import Progress
from nextlat_dist.reporting.tables import markdown_table, table


def test_tables() -> None:
    columns = {"name": "{name}", "x": "{value:.1f}"}
    rows = [{"name": "long name", "value": 1.25}, {"name": "b", "value": None}]
    assert table(columns, rows).split("\n") == ["     name    x", "long name  1.2", "        b    –"]
    assert markdown_table(columns, rows).split("\n")[1:] == ["|---:|---:|", "| long name | 1.2 |", "| b | – |"]


def test_content_is_flat_and_names_no_host() -> None:
    content = report.Report("command", {}, {"a": 1, "b": True}, []).content()
    assert set(content) == {"command", "options", "machine", "versions", "summary", "rows"}
    assert set(content["versions"]) == {"python", *report.REPORTED_PACKAGES}
    assert platform.node() not in json.dumps(content)
    with pytest.raises(AssertionError, match="flat"):
        report.Report("command", {}, {"a": [1]}, [])


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("work", 2, shown=True)
    shown.add(10)
    shown.add(10)
    assert capsys.readouterr().err.startswith("work: 2/2, ")
    hidden = Progress("work", 1, shown=False)
    hidden.add(10)
    assert capsys.readouterr().err == ""
