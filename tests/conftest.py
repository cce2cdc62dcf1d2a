"""Fixtures of many tests: pools of real ranks for each test module, and a small dataset of real text."""

from __future__ import annotations

import argparse
import ast
import configparser
import csv
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.kit.datasets import tiny_tokenizer
from tests.kit.harness import Ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that starts a job in the background lets it ignore Ctrl-C, and every process below it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine must not fail a property: no time is asserted.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
# Of this test run alone: what an earlier one found out about a shard must not decide anything here.
_cache = tempfile.TemporaryDirectory(prefix="nextlat-test-cache-")
os.environ["NEXTLAT_CACHE"] = _cache.name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.kit.scheduling import OneFileOfRanks

    return OneFileOfRanks(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A command sets handlers for the rest of its process, which runs other tests here."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _pool(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    yield from _pool(1)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    yield from _pool(2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    yield from _pool(4)


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text with prompts as `<dir>/train` and `<dir>/validation`, written by the real commands; 600 token ids."""
    directory = tmp_path_factory.mktemp("text")
    lines = []
    for module in (argparse, ast, configparser, textwrap, csv):
        source = inspect.getsource(module)
        for number, start in enumerate(range(0, min(len(source), 12_000), 1_500)):
            part = source[start : start + 1_500]
            lines.append(
                {
                    "name": f"{module.__name__}-{number}",
                    "prompt": part[: 60 + 7 * number],
                    "text": part[60 + 7 * number :],
                }
            )
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["shard", "--input", str(text), "--tokenizer", str(tiny_tokenizer()), "--output", str(directory)]
    command += ["--field", "text", "--prompt-field", "prompt", "--validation-fraction", "0.2"]
    command += ["--record-tokens", "1024", "--no-shuffle"]  # tests know where each document is
    subprocess.run([sys.executable, "-m", "data_tools.cli", *command], check=True, capture_output=True)
    return directory
