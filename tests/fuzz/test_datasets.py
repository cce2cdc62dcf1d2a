"""Three hundred crafted datasets: each command reads one, or says in one sentence what is wrong with it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.cli import main as data_main
from data_tools.shards.shard import ShardOptions, shard
from data_tools.tars.index import find_tars, index
from data_tools.text.find import find_files
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource
from nextlat_dist.cli import main
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import MembersEntry, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.reporting.console import say
from tests.kit.corpora import TEXTS
from tests.kit.crafted_datasets import craft
from tests.kit.datasets import tiny_tokenizer
from tests.kit.pages import ROOT
from tests.kit.tars import text_files, write_tar

COUNT = 300
SEED = 14
# What tqdm writes.
BAR = "\r\n\t"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dataset of `shard` with prompts, and one of adopted tars."""
    root = tmp_path_factory.mktemp("originals")
    lines = root / "rows.jsonl"
    lines.write_text("".join(json.dumps({"q": "Q? ", "text": text}) + "\n" for text in TEXTS[:40]))
    source = FileSource(find_files([str(lines)]), Fields(prompt="q"))
    shard(
        source,
        ShardOptions(tiny_tokenizer(), root / "own", record_tokens=300, shard_tokens=2000, has_prompts=True),
    )
    (root / "adopted").mkdir()
    write_tar(root / "adopted/a.tar", text_files({f"{n:03d}": text for n, text in enumerate(TEXTS[:10])}))
    tars = find_tars([str(root / "adopted")], None)
    index(tars, Tokenizer(tiny_tokenizer()), MembersEntry("text", "txt"), split="train", bos=True, eos=True)
    return [root / "own", root / "adopted"]


def read_all(dataset: Path) -> int:
    """Read every record, as training does."""
    storage = open_storage(dataset)
    try:
        records = Records(storage, read_manifest(storage))
        for number in range(len(records)):
            records.read(number)
    except UserError as error:
        say(f"error: {error}", error=True)
        return 2
    return 0


def commands(dataset: Path, config: Path) -> dict[str, Callable[[], int]]:
    overrides = [f"data.train={dataset}", "data.sequence_length=64"]
    return {
        "inspect": lambda: data_main(["inspect", str(dataset)]),
        "verify": lambda: data_main(["verify", str(dataset)]),
        "mix-preview": lambda: data_main(["mix-preview", "--source", f"a={dataset}:1", "--tokens", "10000"]),
        "reading": lambda: read_all(dataset),
        "train --dry-run": lambda: main(["train", "--config", str(config), "--dry-run", *overrides]),
    }


def problem_of(run: Callable[[], int], capsys: pytest.CaptureFixture[str], opened: list[str]) -> str | None:
    """What a command did that it must not; None for an answer."""
    opened.clear()
    try:
        status = run()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except Exception as error:
        capsys.readouterr()
        return f"{type(error).__name__}: {error!s:.200}"
    said = capsys.readouterr()
    if any((each < " " or each == "\x7f") and each not in BAR for each in said.out + said.err):
        return f"control characters: {said.out + said.err!r:.300}"
    if "Traceback" in said.err:
        return f"a traceback: {said.err[-300:]}"
    if status not in (0, 1, 2):
        return f"exit status {status}"
    if opened:
        return f"it opened {opened[:3]}"
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crafted_dataset_is_answered(
    originals: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}/run\n")
    foreign: list[str] = []
    # The dataset, the cache, the config, and what Python and its packages read of themselves and of the system.
    of_python = (str(ROOT), sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys", "/dev")
    allowed = of_python

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not any(path == each or path.startswith(f"{each}/") for each in allowed):
                foreign.append(path)
        if event == "socket.connect":
            foreign.append(f"a socket {arguments[1]!r}")

    sys.addaudithook(note)
    problems = []
    for number in range(COUNT):
        draw = random.Random(SEED * 1000 + number)
        dataset = tmp_path / f"{number}"
        said = craft(originals[number % 5 == 0], dataset, draw)
        allowed = (*of_python, str(dataset), str(tmp_path / "cache"), str(config))
        for name, run in commands(dataset, config).items():
            if (problem := problem_of(run, capsys, foreign)) is not None:
                problems.append(f"dataset {number} ({said}), {name}: {problem}")
    assert not problems, f"{len(problems)} of {COUNT}:\n" + "\n".join(problems[:20])
