"""Whatever came to an export's place while it was written is not replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface import export as exporting
from nextlat_dist.huggingface.destination import listed

CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "formats" / "run" / "checkpoints"


def test_a_folder_that_came_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "export"

    def listed_late(folder: Path) -> dict[str, str]:
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
        return listed(folder)

    monkeypatch.setattr(exporting, "listed", listed_late)
    with pytest.raises(UserError, match="it will not be replaced"):
        exporting.export_checkpoint(CHECKPOINTS, output, check_logits=False)
    assert (output / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_link_that_was_turned_meanwhile_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "link"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    output.symlink_to("one")

    def listed_late(folder: Path) -> dict[str, str]:
        output.unlink()
        output.symlink_to("two")
        return listed(folder)

    monkeypatch.setattr(exporting, "listed", listed_late)
    with pytest.raises(UserError, match="leads to another folder"):
        exporting.export_checkpoint(CHECKPOINTS, output, check_logits=False)
    assert not list((tmp_path / "one").iterdir())
    assert not list((tmp_path / "two").iterdir())
