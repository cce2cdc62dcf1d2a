from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.inspect import Histogram, inspect
from data_tools.shards.shard import ShardOptions, shard
from data_tools.tars.index import find_tars, index
from data_tools.text.find import find_files
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource
from nextlat_dist.data.shard_format import MembersEntry
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer, write_dataset
from tests.kit.servers import file_server
from tests.kit.tars import text_files, write_tar


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
    text = inspect(str(dataset), samples=3, sample_tokens=20).text()
    assert "3 documents" in text
    assert "⟦bos⟧Ask: ⟦end of prompt⟧first text⟦eos⟧" in text
    assert "⟦bos⟧Ask: ⟦end of prompt⟧the third⟦eos⟧" in text
    assert "tokens⟧" in text.split("document 1")[1]
    assert "document 1" not in inspect(str(dataset), samples=2, sample_tokens=20).text()
    assert "document" not in inspect(str(dataset), samples=0, sample_tokens=20).text().split("█")[-1]


def test_the_picture_is_a_png(dataset: Path, tmp_path: Path) -> None:
    inspect(str(dataset), samples=0, sample_tokens=20).png(tmp_path / "pictures/lengths.png")
    assert (tmp_path / "pictures/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_another_tokenizer_in_the_directory_is_refused(dataset: Path) -> None:
    path = dataset / "tokenizer.model"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b"self", b"sole"))
    with pytest.raises(UserError, match="is not the tokenizer that made"):
        inspect(str(dataset), samples=1, sample_tokens=20)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer .* cannot be read"):
        inspect(str(dataset), samples=1, sample_tokens=20)


def test_remote_and_adopted_datasets_look_the_same(dataset: Path, tmp_path: Path) -> None:
    local = inspect(str(dataset), samples=3, sample_tokens=20)
    with file_server(dataset) as server:
        remote = inspect(f"http://{server.address}", samples=3, sample_tokens=20)
        assert remote.text() == local.text().replace(str(dataset), f"http://{server.address}")
    write_tar(tmp_path / "tars/a.tar", text_files({"a": "one text", "b": "another"}))
    tars = find_tars([str(tmp_path / "tars")], None)
    index(tars, Tokenizer(tiny_tokenizer()), MembersEntry("text", "txt"), split="train", bos=True, eos=True)
    text = inspect(str(tmp_path / "tars"), samples=3, sample_tokens=20).text()
    assert "⟦bos⟧one text⟦eos⟧" in text
    assert "adopted text of .txt members" in text


def test_the_report_as_json(dataset: Path, tmp_path: Path) -> None:
    report = tmp_path / "new/report.json"
    assert main(["inspect", str(dataset), "--samples", "1", "--json", str(report)]) == 0
    raw = json.loads(report.read_text())
    assert (raw["split"], raw["shards"], raw["documents"], raw["has_prompts"]) == ("train", 1, 3, True)
    lengths = inspect(str(dataset), samples=0, sample_tokens=0).lengths
    assert raw["tokens"] == lengths.sum()
    assert raw["tokens_per_document"]["longest"] == lengths.max()
    assert sum(raw["histogram"]["documents"]) == 3
    assert raw["histogram"]["edges"][0] <= lengths.min() < raw["histogram"]["edges"][1]
    (sample,) = raw["samples"]
    assert (sample["document"], sample["tokens"]) == (0, lengths[0])
    assert sample["text"] == "⟦bos⟧Ask: ⟦end of prompt⟧first text⟦eos⟧"


def test_nothing_to_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, [], tokenizer=Tokenizer(tiny_tokenizer()))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--samples", "-1"]) == 2
    assert "--samples is -1" in capsys.readouterr().err
