from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.inspect import Histogram, inspect
from data_tools.shard import ShardOptions, shard
from data_tools.sources import Fields, FileSource, find_files
from nextlat_dist.errors import UserError
from tests.data.datasets import tiny_tokenizer


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    texts = ["first text", "second " * 100, "the third"]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"ask": "Ask: ", "text": text}) + "\n" for text in texts))
    source = FileSource(find_files([str(lines)]), Fields(prompt="ask"))
    shard(source, ShardOptions(tiny_tokenizer(), tmp_path / "data", record_tokens=50, has_prompts=True))
    return tmp_path / "data"


def test_a_histogram_counts_every_length_in_its_power_of_two() -> None:
    histogram = Histogram.of(np.array([1, 2, 3, 4, 7, 8, 8, 40]))
    assert histogram.edges.tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert histogram.counts.tolist() == [1, 2, 2, 2, 0, 1]
    lines = histogram.text().splitlines()
    assert len(lines) == 6
    assert lines[1].count("█") == 2 * lines[0].count("█")
    assert "█" not in lines[4]
    assert Histogram.of(np.array([5])).counts.tolist() == [1]


def test_samples_show_borders_prompts_and_what_is_left_out(dataset: Path) -> None:
    text = inspect(dataset, samples=3, sample_tokens=20, png=None)
    assert "3 documents" in text
    assert "⟦bos⟧Ask: ⟦end of prompt⟧first text⟦eos⟧" in text
    assert "⟦bos⟧Ask: ⟦end of prompt⟧the third⟦eos⟧" in text
    assert "tokens⟧" in text.split("document 1")[1]
    assert "document 1" not in inspect(dataset, samples=2, sample_tokens=20, png=None)
    assert "document" not in inspect(dataset, samples=0, sample_tokens=20, png=None).split("█")[-1]


def test_the_picture_is_a_png(dataset: Path, tmp_path: Path) -> None:
    inspect(dataset, samples=0, sample_tokens=20, png=tmp_path / "pictures/lengths.png")
    assert (tmp_path / "pictures/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_another_tokenizer_in_the_directory_is_refused(dataset: Path) -> None:
    path = dataset / "tokenizer.model"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b"self", b"sole"))
    with pytest.raises(UserError, match="is not the tokenizer that made"):
        inspect(dataset, samples=1, sample_tokens=20, png=None)
