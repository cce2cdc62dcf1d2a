"""`nextlat export` may replace nothing but an export to which nothing was added."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextlat_dist.errors import UserError
from nextlat_dist.files import EXPORT_REPORT_FILE
from nextlat_dist.huggingface.destination import LISTED, destination
from nextlat_dist.huggingface.export import export_checkpoint
from nextlat_dist.huggingface.tokenizer import export_tokenizer
from tests.kit.system import Flushes, disk, files_up_to

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
CHECKPOINTS = FORMATS / "run" / "checkpoints"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    path = tmp_path_factory.mktemp("exported") / "export"
    export_checkpoint(CHECKPOINTS, path, check_logits=False)
    return path


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "export")


def refusal(output: Path) -> str:
    with pytest.raises(UserError) as caught:
        destination(output)
    assert "\n" not in str(caught.value)
    assert "--output" in str(caught.value)
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_lists_every_file(exported: Path) -> None:
    listed = json.loads((exported / EXPORT_REPORT_FILE).read_text())[LISTED]
    assert sorted(listed) == sorted(set(content(exported)) - {EXPORT_REPORT_FILE})


def test_what_an_export_may_replace(export: Path, tmp_path: Path) -> None:
    assert destination(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert destination(tmp_path / "empty") == tmp_path / "empty"
    assert destination(export) == export
    (export / "latent_predictor" / "calibration.json").write_text("{}")
    (export / "latent_predictor" / "draft_vocabulary.safetensors").write_text("written by calibrate")
    assert destination(export) == export
    for name in ("export", "mtp_export"):  # of an earlier release, whose reports list no files
        assert destination(FORMATS / name) == FORMATS / name


def test_a_link_is_followed(export: Path, tmp_path: Path) -> None:
    for target in (export, tmp_path / "nowhere"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        assert destination(tmp_path / "link") == target


def trained_further(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, export / "model.safetensors", {"format": "pt"})


def another_sharded_model(export: Path) -> None:
    for path in export.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_file({"a": torch.zeros(2)}, export / "model-00001-of-00001.safetensors")
    (export / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    (export / "config.json").write_text("{}")


ADDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another model": (another_sharded_model, "is not an export: it has no export_report.json"),
    "a report of something else": (
        lambda path: (path / EXPORT_REPORT_FILE).write_text('{"rows": 3}'),
        "is not an export: it has no export_report.json",
    ),
    "a report cut short": (
        lambda path: (path / EXPORT_REPORT_FILE).write_text("{"),
        "is not an export: it has no export_report.json",
    ),
    "a report without end": (
        lambda path: (path / EXPORT_REPORT_FILE).write_text("[" * 100_000),
        "is not an export: it has no export_report.json",
    ),
    "notes": (lambda path: (path / "notes.md").write_text("seed 3"), "holds notes.md, which no export wrote"),
    "an adapter": (
        lambda path: (path / "adapter").mkdir() or (path / "adapter" / "adapter_model.safetensors").write_text("x"),
        "holds adapter/adapter_model.safetensors, which no export wrote",
    ),
    "an empty folder": (lambda path: (path / "mine").mkdir(), "holds mine, which no export wrote"),
    "a hidden file": (lambda path: (path / ".git").write_text("x"), "holds .git, which no export wrote"),
    "a linked folder": (lambda path: (path / "mine").symlink_to("/usr"), "holds mine, which no export wrote"),
    "weights trained further": (trained_further, "holds another model.safetensors than was exported"),
    "a template": (lambda path: (path / "chat_template.jinja").write_text("x"), "holds chat_template.jinja, which no"),
}


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("release", ["this", "earlier"])
def test_what_was_added_or_changed_is_named(kind: str, release: str, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported if release == "this" else FORMATS / "export", tmp_path / "export")
    change, sentence = ADDED[kind]
    change(folder)
    before = content(folder)
    assert f"{folder} exists and {sentence}" in refusal(folder)
    with pytest.raises(UserError, match=re.escape(sentence)):
        export_checkpoint(CHECKPOINTS, folder, check_logits=False)
    assert content(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_edited_tokenizer_settings_are_kept(export: Path) -> None:
    path = export / "tokenizer_config.json"
    path.write_text(path.read_text().replace("left", "right"))
    assert "holds another tokenizer_config.json than was exported" in refusal(export)


def test_what_is_no_folder_of_its_own(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    for name in ("file", "pipe", "round", "to file"):
        assert f"{tmp_path / name} is no folder" in refusal(tmp_path / name)
    mount = next(path for path in map(Path, ("/dev/shm", "/proc", "/dev")) if path.is_mount())
    assert f"{mount} is a mount point, which cannot be replaced as a whole" in refusal(mount)
    monkeypatch.chdir(export)
    for name in (Path("."), Path("../export"), export):
        assert "holds the current folder, which cannot be replaced" in refusal(name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "name a folder in it: --output export" in refusal(Path("."))


def test_a_new_export_takes_the_old_ones_name_through_a_link(export: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(export)
    (export / "latent_predictor" / "calibration.json").write_text("{}")
    export_checkpoint(CHECKPOINTS, tmp_path / "link", dtype="bf16", check_logits=False)
    assert json.loads((export / EXPORT_REPORT_FILE).read_text())["dtype"] == "bfloat16"
    assert not (export / "latent_predictor" / "calibration.json").exists()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "link"]


def test_a_full_disk_keeps_the_old_export(exported: Path, tmp_path: Path) -> None:
    """At every size of the disk, so at every file: one sentence, the old export whole, nothing of the new one."""
    before, refused = content(exported), 0
    size = sum(-(-len(data) // 4096) * 4 for data in before.values())
    with disk(tmp_path / "disk", size) as remount:
        export = shutil.copytree(exported, tmp_path / "disk" / "export")
        for room in range(4, 2 * size, 8):
            remount(f"size={size + room}k")
            try:
                export_checkpoint(CHECKPOINTS, export, dtype="bf16", check_logits=False)
            except UserError as error:
                assert str(error).startswith(f"{export} cannot be written (No space left on device")  # noqa: PT017
                assert content(export) == before
                assert [path.name for path in export.parent.iterdir()] == ["export"]
                refused += 1
            else:
                break
        assert json.loads((export / EXPORT_REPORT_FILE).read_text())["dtype"] == "bfloat16"
        assert refused >= 8
        remount("ro")
        with pytest.raises(UserError, match=r"export cannot be written \(Read-only file system"):
            export_checkpoint(CHECKPOINTS, export, check_logits=False)


def test_no_room_for_a_file_keeps_the_old_export(export: Path, tmp_path: Path) -> None:
    """The same without the privilege to mount a disk."""
    before = content(export)
    for size in (100, 20_000):
        with files_up_to(size), pytest.raises(UserError, match=r"export cannot be written \(File too large") as caught:
            export_checkpoint(CHECKPOINTS, export, check_logits=False)
        assert "\n" not in str(caught.value)
        assert content(export) == before
        assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_tokenizer_that_cannot_be_written_is_the_systems_refusal(tmp_path: Path) -> None:
    with files_up_to(6000), pytest.raises(OSError, match="File too large"):
        export_tokenizer(FORMATS / "export" / "tokenizer.model", tmp_path, 64)


def test_a_rename_that_fails_keeps_the_old_export(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    before = content(export)
    monkeypatch.setattr("nextlat_dist.files._swap", lambda *_: False)
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(UserError, match="export cannot be written"):
        export_checkpoint(CHECKPOINTS, export, check_logits=False)
    assert content(export) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_an_export_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    export_checkpoint(CHECKPOINTS, tmp_path / "export", check_logits=False)
    assert flushes.renamed[-1] == "export"
    flushes.assert_on_disk(tmp_path)
    flushes.assert_names_on_disk()
