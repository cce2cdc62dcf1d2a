from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools.text.find import find_inputs


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five files by way of `find -L`: web/a.txt, books/{1,2,3}.txt (a linked folder) and a linked file."""
    (tmp_path / "store/books").mkdir(parents=True)
    (tmp_path / "corpus/web").mkdir(parents=True)
    for number in (1, 2, 3):
        (tmp_path / f"store/books/{number}.txt").write_text(f"book {number}")
    (tmp_path / "corpus/web/a.txt").write_text("web")
    (tmp_path / "corpus/books").symlink_to(tmp_path / "store/books")
    (tmp_path / "corpus/linked.txt").symlink_to(tmp_path / "store/books/1.txt")
    return tmp_path / "corpus"


FIVE = ["books/1.txt", "books/2.txt", "books/3.txt", "linked.txt", "web/a.txt"]


@pytest.mark.parametrize("given", ["", "/**/*.txt", "/*", "/**"])
def test_links_are_followed_whichever_way_the_files_are_named(corpus: Path, given: str) -> None:
    assert [file.name for file in find_inputs([f"{corpus}{given}"]).files] == FIVE


def test_what_is_left_out_is_named(corpus: Path) -> None:
    (corpus / "broken.txt").symlink_to("/nowhere/gone")
    (corpus / "web/again").symlink_to(corpus)
    (corpus / "web/self").symlink_to(".")
    (corpus / ".git").mkdir()
    os.mkfifo(corpus / "pipe")
    for given in (str(corpus), f"{corpus}/**"):
        found = find_inputs([given])
        assert [file.name for file in found.files] == FIVE
        assert found.left_out == {
            "hidden files and folders": [".git"],
            "broken links": ["broken.txt"],
            "pipes, sockets and devices": ["pipe"],
            "links to a folder that they are in": ["web/again", "web/self"],
        }
    assert "1 broken links (broken.txt)" in found.describe()


def test_two_loops_end(tmp_path: Path) -> None:
    """A glob that goes through them again and again would need 2 ** 40 steps."""
    (tmp_path / "a.txt").write_text("x")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(".")
    assert [file.name for file in find_inputs([f"{tmp_path}/**/*.txt"]).files] == ["a.txt"]


def test_names_that_are_no_utf8_or_hold_control_characters_fit_into_a_report(tmp_path: Path) -> None:
    for name in (b"Mu\xf1oz.txt", b"clear\x1b[2J.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("x")
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == [r"Mu\xf1oz.txt", r"clear\x1b[2J.txt"]
    assert all(file.path is not None and file.path.is_file() for file in found.files)
