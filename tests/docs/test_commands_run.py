"""Commands that a reader copies from a page run: all its bash and Python blocks, in order, in one directory.

Blocks marked `<!-- not run: … -->` are left out; `<!-- run with: … -->` says what is made smaller (tests/kit/pages.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.commands import run
from tests.kit.page_data import Prepare, checkout, corpus, hidden_markov, mixture, quickstart, small_run
from tests.kit.pages import PAGES, ROOT, Block, blocks

# What the commands of a page find there; of other pages, the checkout alone.
PREPARED: dict[str, Prepare] = {
    "README.md": quickstart,
    "docs/belief.md": hidden_markov,
    "docs/checkpoints.md": quickstart,
    "docs/data.md": corpus,
    "docs/data_stream.md": mixture,
    "docs/decode.md": quickstart,
    "docs/evaluate.md": quickstart,
    "docs/export.md": quickstart,
    "docs/extend.md": small_run,
    "docs/python.md": quickstart,
    "docs/quickstart.md": quickstart,
    "docs/speedup.md": quickstart,
}
SLOW = {"docs/belief.md", "docs/tasks.md"}  # longer than half a minute


def executed(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.not_run is None and block.language in ("bash", "python")]


RUN_PAGES = [page.relative_to(ROOT).as_posix() for page in PAGES if executed(page)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in RUN_PAGES]
)
def test_everything_on_the_page_runs(page: str, tmp_path: Path, prepared: Callable[[Prepare, Path], None]) -> None:
    if page in PREPARED:
        prepared(PREPARED[page], tmp_path)
    else:
        checkout(tmp_path)
    printed = ""
    for block in blocks(ROOT / page):
        if block.is_output:
            assert block.code.strip() in printed, f"{block.name}: the command above printed\n{printed}"
        elif block.file is not None:
            (tmp_path / block.file).write_text(block.code)
        elif block.not_run is None and block.language == "bash":
            printed = run(tmp_path, "bash", "-euo", "pipefail", "-c", block.small_code, timeout=900)
        elif block.not_run is None and block.language == "python":
            printed = run(tmp_path, "python", "-c", block.small_code)


def test_prepared_pages_are_pages_that_run() -> None:
    assert set(PREPARED) | SLOW <= set(RUN_PAGES)
