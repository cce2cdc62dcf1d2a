"""Shipped files: found in a checkout and in a wheel's package data, listed, and copied without replacing anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import nextlat_dist
from nextlat_dist.cli import main
from nextlat_dist.config.shipped import first_comment, shipped_configs, shipped_files, shipped_root
from nextlat_dist.errors import UserError

CHECKOUT = Path(__file__).parents[2]


def test_every_config_and_script_of_a_checkout_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(shipped_configs().values()) == set(CHECKOUT.glob("configs/**/*.yaml"))
    assert main(["configs"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(listed) == set(shipped_files())
    assert listed["quickstart"].endswith("  A small NextLat model on the Python standard library's text")
    assert "launch/torchrun.sh" in listed


def test_a_file_or_a_folder_is_copied_and_nothing_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cpu/hmm", "configs/cpu/hmm.yaml"):
        target = tmp_path / "new" / name.replace("/", "-")
        assert main(["configs", name, "--output", str(target)]) == 0
        assert target.read_bytes() == (CHECKOUT / "configs/cpu/hmm.yaml").read_bytes()
        target.write_text("mine")
        assert main(["configs", name, "--output", str(target)]) == 2
        assert f"--output {target} exists, it must be a new file" in capsys.readouterr().err
        assert target.read_text() == "mine"
    assert main(["configs", "launch", "--output", str(tmp_path / "launch")]) == 0
    scripts = {path.name for path in (tmp_path / "launch").iterdir()}
    assert {"setup.sh", "single_node.sh", "constraints.txt"} <= scripts
    assert (tmp_path / "launch" / "setup.sh").stat().st_mode == (CHECKOUT / "launch" / "setup.sh").stat().st_mode


def test_one_is_printed_and_mistakes_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "quickstart"]) == 0
    assert capsys.readouterr().out == (CHECKOUT / "configs/quickstart.yaml").read_text()
    for arguments, part in (
        (["hm"], "no shipped config is named 'hm', the nearest is 'cpu/hmm'"),
        (["paper"], "paper is a folder of configs, it must be copied; add --output DIR"),
        (["--output", "x.yaml"], "--output x.yaml needs the NAME"),
    ):
        assert main(["configs", *arguments]) == 2
        assert part in capsys.readouterr().err


def test_a_wheel_finds_its_own_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "nextlat_dist"
    package.mkdir(parents=True)
    monkeypatch.setattr(nextlat_dist, "__file__", str(package / "__init__.py"))
    with pytest.raises(UserError, match="has no configs with it"):
        shipped_root()
    for root in (package.parent, package / "_shipped"):  # a checkout, then a wheel
        for folder in ("configs", "launch"):
            (root / folder).mkdir(parents=True)
        assert shipped_root() == root
    shutil.copy(CHECKOUT / "configs/quickstart.yaml", package / "_shipped" / "configs")
    assert list(shipped_files()) == ["quickstart"]


def test_the_sentence_of_a_list_is_the_first_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, sentence in (
        ("# One thing,\n# and another. More.\nmodel: {}\n", "One thing, and another."),
        ("#!/usr/bin/env bash\n# shellcheck shell=bash\n# Does: this\n", "Does"),
        ("model: {}\n# later\n", ""),
    ):
        path.write_text(text)
        assert first_comment(path) == sentence
