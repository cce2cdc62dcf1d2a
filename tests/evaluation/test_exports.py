"""`--export [name=]DIR …`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.exports import NamedExport, named_exports


def test_directories_of_one_name_are_its_runs() -> None:
    assert named_exports(["gpt=runs/a/export", "nextlat=b", "nextlat=c=d"]) == [
        NamedExport("gpt", 0, Path("runs/a/export")),
        NamedExport("nextlat", 0, Path("b")),
        NamedExport("nextlat", 1, Path("c=d")),
    ]


def test_a_directory_without_a_name_has_its_own() -> None:
    found = named_exports(["runs/gpt/export", "runs/latent", "runs/a=b"])
    assert [export.name for export in found] == ["gpt", "latent", "a=b"]
    assert [export.path for export in found] == [Path("runs/gpt/export"), Path("runs/latent"), Path("runs/a=b")]


def test_an_existing_directory_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    assert named_exports(["lr=3"]) == [NamedExport("lr=3", 0, Path("lr=3"))]


@pytest.mark.parametrize("given", [["a/x", "b/x"], ["a/x", "x=b"], ["x=b", "a/x"], ["run/export", "run=c"]])
def test_runs_are_never_made_of_directories_that_happen_to_be_called_alike(given: list[str]) -> None:
    with pytest.raises(UserError, match="two exports are called"):
        named_exports(given)


@pytest.mark.parametrize("given", [[], ["=a"], ["a="]])
def test_nothing_is_no_export(given: list[str]) -> None:
    with pytest.raises(UserError, match=r"no (export|name)"):
        named_exports(given)
