"""Publishing a report, and what a report is."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from nextlat_dist.errors import UserError
from nextlat_dist.reporting.pictures import panels
from nextlat_dist.reporting.publish import publish, run_benchmark
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.tables import table


@dataclass(frozen=True)
class Inner:
    median: float


@dataclass(frozen=True)
class Row:
    name: str
    speed: Inner | None


@dataclass(frozen=True)
class Named:
    name: str

    def to_json(self) -> dict[str, str]:
        return {"of": self.name}


def draw() -> Figure:
    figure, _ = panels(1, "picture")
    return figure


def report() -> Report:
    return Report(
        command="nextlat measure",
        options={"seed": 1},
        summary={"speed": 2.0},
        rows=[{"name": "a", "speed": 2.0}],
        extra={"caveat": "none"},
        text="a table",
        remarks=["one thing is missing"],
        pictures={"speed.png": draw},
        pages={"page.md": "# Page\n"},
    )


def test_publishes_text_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report()
    publish(found, tmp_path / "new" / "report.json", tmp_path / "pictures")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert list(written) == ["command", "options", "machine", "versions", "summary", "rows", "caveat"]
    assert written == found.content()
    assert (tmp_path / "pictures" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "pictures" / "page.md").read_text() == "# Page\n"
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a table\n", "one thing is missing\n")


def test_draws_and_writes_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fails() -> Figure:
        raise AssertionError("nobody asked for a picture")

    publish(Report("command", {}, {}, [], pictures={"a.png": fails}))
    assert list(tmp_path.iterdir()) == []


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    publish(report(), path)
    before = path.read_text()
    with pytest.raises(TypeError):
        publish(Report("command", {"seed": object()}, {}, []), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_is_a_value_with_flat_numbers() -> None:
    with pytest.raises(FrozenInstanceError):
        report().text = "other"  # type: ignore[misc]
    with pytest.raises(AssertionError, match="flat"):
        Report("command", {}, {"a": [1]}, [])


def test_rows_may_be_records() -> None:
    rows = [Row("a", Inner(1.25)), Row("b", None)]
    columns = {"name": "{name}", "speed": "{speed.median:.1f}"}
    assert table(columns, rows).split("\n") == ["name  speed", "   a    1.2", "   b      –"]
    twice = [("x", "{speed.median:.1f}"), ("x", "{speed.median:.2f}")]
    assert table(twice, rows).split("\n") == ["  x     x", "1.2  1.25", "  –     –"]
    plain = [Row("a", Inner(1.0)), Named("b")]
    assert Report("command", {}, {}, plain).content()["rows"] == [{"name": "a", "speed": {"median": 1.0}}, {"of": "b"}]


def test_imports_no_torch() -> None:
    modules = ("report", "publish", "runs", "options", "console", "pictures", "tables")
    code = "; ".join(f"import nextlat_dist.reporting.{name}" for name in modules)
    code += "; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def measured(options: argparse.Namespace) -> Report:
    return Report("bench", {"quick": options.quick}, {"speed": 2.0 + options.more}, [], text="speed = 2")


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--more", type=int)


def test_a_benchmark_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--more", "1", "--json", str(tmp_path / "b.json")]
    assert run_benchmark("bench", "", measured, words, add_more) == 0
    content = json.loads((tmp_path / "b.json").read_text())
    assert (content["summary"], content["options"]) == ({"speed": 3.0}, {"quick": True})
    assert "speed = 2" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("no such export"), OSError("no space left")])
def test_what_cannot_be_measured_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(options: argparse.Namespace) -> Report:
        raise error

    assert run_benchmark("bench", "", fails, []) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
