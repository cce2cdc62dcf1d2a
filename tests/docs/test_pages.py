"""The pages are whole: links lead somewhere, commands and settings exist, code compiles, README stays short."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from nextlat_dist.config import config_from_dict, load_config
from nextlat_dist.reporting.options import CommandParser
from tests.kit.pages import PAGES, REASONS, ROOT, Block, anchors, blocks, links

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, words) for block in BLOCKS if block.language == "bash" for words in block.commands]
# Programs that are not ours: their own options are not checked.
FOREIGN = {
    "pip",
    "export",
    "sbatch",
    "kubectl",
    "vllm",
    "lm_eval",
    "git",
    "cd",
    "source",
    "pytest",
    "pre-commit",
    "ruff",
    "mypy",
}
RUNS_A_FILE = {"bash", "sbatch", "python"}


class _Parsed(BaseException):  # past every handler of a command
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def parsed(main: Callable[[list[str]], Any], arguments: list[str]) -> argparse.Namespace:
    """What `main` makes of the arguments; stops it before it does anything with them."""

    def stopping(real: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
            raise _Parsed(real(self, args, namespace))

        return stop

    with ExitStack() as stack:
        for parser in (argparse.ArgumentParser, CommandParser):
            stack.enter_context(mock.patch.object(parser, "parse_args", stopping(parser.parse_args)))
        try:
            main(arguments)
        except _Parsed as found:
            return found.options
        except SystemExit:
            raise AssertionError(f"not understood: {' '.join(arguments)}") from None
    raise AssertionError("the command did not parse its arguments")


def check_program(block: Block, words: list[str]) -> None:
    """The program exists; one of ours understands its options."""
    ours = {"nextlat": "nextlat_dist.cli", "nextlat-data": "data_tools.cli"}
    if words[0] in ours:
        parsed(importlib.import_module(ours[words[0]]).main, words[1:])
    elif words[:2] == ["python", "-m"] and words[3:]:
        parsed(importlib.import_module(words[2]).main, words[3:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), f"{block.name}: there is no module {words[2]}"
    elif words[0] in RUNS_A_FILE:
        assert (ROOT / words[1]).is_file(), f"{block.name}: there is no {words[1]}"
    else:
        assert words[0] in FOREIGN, f"{block.name}: unknown command {words[0]}"


def check_settings(block: Block, words: list[str]) -> None:
    """Configurations that are named are there, and key=value settings are keys of them."""
    settings = [word for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+=.*", word)]
    if any(re.search(r"=\w+:\w+$", setting) for setting in settings):
        return  # brings code of the reader's own: run, not read, in test_commands_run.py
    configs = [ROOT / word for word in words if word.startswith("configs/")]
    for config in configs:
        assert config.is_file(), f"{block.name}: there is no {config}"
    runs = [config for config in configs if config.parent.name not in ("ablations", "experiments")]
    for run in runs or [None]:
        load_config(run, settings)


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b.name}-{' '.join(w[:2])}" for b, w in COMMANDS])
def test_every_command_exists_with_its_options(block: Block, words: list[str]) -> None:
    check_program(block, words)
    check_settings(block, words)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.name)
def test_every_yaml_block_is_a_configuration(block: Block) -> None:
    if block.not_run is None:
        config_from_dict(yaml.safe_load(block.code))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.name)
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.code, block.name, "exec")


def test_what_is_not_run_says_why() -> None:
    used = {block.not_run for block in BLOCKS if block.not_run is not None}
    assert used <= set(REASONS)
    assert {"gpu", "cluster", "internet", "long"} <= used
    named = [name for page in PAGES for name in re.findall(r"tests/[\w/]+(?:\.py)?", page.read_text())]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"pages name tests that are not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} is not there"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leads out of the project"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {file.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    """Paths in code spelling below the project's own folders."""
    folders = "nextlat_dist|data_tools|configs|launch|results|examples|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*\w/?)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name} is not there"


def test_readme_is_short_and_names_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_bytes()) <= 12 * 1024
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"}
    assert pages <= set(links(readme)), f"not in README's table: {sorted(pages - set(links(readme)))}"


def test_first_screen_says_what_was_not_run() -> None:
    first_screen = (ROOT / "README.md").read_text().partition("\n## What you will see")[0]
    for words in ("no GPU yet", "mixture of experts", "context parallelism", "fp8", "launch/test.sh", ".png)"):
        assert words in first_screen, words


def test_commands_of_the_pages_need_tools_that_exist() -> None:
    assert shutil.which("bash")
    assert {words[0] for _, words in COMMANDS} >= {"nextlat", "nextlat-data", "bash", "python"}


def test_the_tree_of_the_design_page_is_the_tree() -> None:
    [tree] = [b for b in blocks(ROOT / "docs/design.md") if b.code.startswith("nextlat_dist/\n")]
    shown, above = set(), [""] * 9
    for line in tree.code.splitlines():
        folder = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth] = folder
        shown.add("".join(above[: depth + 1]))
    real = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for package in ("nextlat_dist", "data_tools")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert shown == real, f"the tree of docs/design.md differs in {sorted(shown ^ real)}"


def test_the_arrows_of_the_design_page_are_the_contract() -> None:
    [shown] = [b for b in blocks(ROOT / "docs/design.md") if b.code.startswith("cli\n")]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    assert shown.code.splitlines() == layers


def test_the_extras_of_the_install_page_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`.*`) \|", (ROOT / "docs/install.md").read_text(), flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(extras)
