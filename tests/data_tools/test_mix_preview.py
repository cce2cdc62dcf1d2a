from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.mix_preview import CHUNK_ROWS, open_preview, parse_source, preview, table
from nextlat_dist.config.schema import DataConfig, SourceConfig, WeightChange
from nextlat_dist.data.loader import RowLoader, Source
from nextlat_dist.data.mixture import Mixture
from nextlat_dist.data.shard_format import MANIFEST_FILE, manifest_bytes, read_manifest
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, write_dataset

WEIGHTS = {"a": 0.6, "b": 0.3, "c": 0.1}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    for name, count in (("a", 40), ("b", 5), ("c", 3)):
        write_dataset(tmp_path / name, numbered_documents([33] * count))
    sources = [SourceConfig(name, str(tmp_path / name), weight) for name, weight in WEIGHTS.items()]
    return DataConfig(sources=sources, sequence_length=16)


def test_every_row_is_counted_as_training_takes_it() -> None:
    changes = [(1000, {"a": 0.0, "b": 0.5, "c": 0.5}), (CHUNK_ROWS + 7, {"a": 1.0, "b": 1.0, "c": 2.0})]
    mixture = Mixture(WEIGHTS, changes)
    rows = CHUNK_ROWS + 3000
    found = preview(mixture, [row for row, _ in changes], rows, 16, {"a": 900.5, "b": 500, "c": 1e9})
    chosen = mixture.start().take(rows)
    counts = np.cumsum(chosen[:, None] == np.arange(3), axis=0)
    assert (found.taken == counts[found.points - 1]).all()
    assert found.points[-1] == rows
    due = np.array([mixture.target(row) for row in range(1, rows + 1)])
    np.testing.assert_allclose(found.due, due[found.points - 1])
    np.testing.assert_allclose(found.deviation, np.abs(counts - due).max(axis=0))
    assert 0 < found.deviation.max() <= 1
    # The 901st row of a and the 501st of b are the first to hold something again.
    expected = [int(np.flatnonzero(chosen == 0)[900]), int(np.flatnonzero(chosen == 1)[500]), None]
    assert found.first_repeat == expected
    np.testing.assert_allclose(found.epochs[-1], counts[-1] / [900.5, 500, 1e9])


def test_repeats_and_epochs_are_those_of_the_loader(data: DataConfig) -> None:
    for packing in ("concat", "pad"):
        found = open_preview(replace(data, packing=packing), tokens=100 * 16)
        loader = RowLoader(
            [Source(source.name, source.path, source.weight) for source in data.sources],
            sequence_length=16,
            packing=packing,
            global_batch_size=1,
            seed=0,
            shuffle=False,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        seen: dict[str, set[int]] = {name: set() for name in WEIGHTS}
        first_repeat: dict[str, int] = {}
        before = dict.fromkeys(WEIGHTS, 0.0)
        for row in range(100):
            tokens = [token for token in loader.next_batch().tokens.reshape(-1).tolist() if token >= 10]
            after = loader.epochs()
            (name,) = [name for name in WEIGHTS if after[name] > before[name]]
            before = after
            if seen[name] & set(tokens):
                first_repeat.setdefault(name, row)
            seen[name] |= set(tokens)
        assert dict(zip(found.names, found.first_repeat, strict=True)) == {
            name: first_repeat.get(name) for name in WEIGHTS
        }
        assert first_repeat.keys() >= {"b", "c"}
        np.testing.assert_allclose(found.epochs[-1], [after[name] for name in found.names])


def test_the_table_says_it_in_words(data: DataConfig) -> None:
    text = table(open_preview(data, tokens=1000 * 16))
    lines = text.splitlines()
    assert lines[0].split() == ["tokens", "a", "b", "c"]
    final = next(line for line in lines if line.split()[0] == "16,000")
    assert final.split()[1:] == ["60.00%", "/", "60.00%", "30.00%", "/", "30.00%", "10.00%", "/", "10.00%"]
    assert any(line.startswith("c: 100 rows, 17.17 epochs, repeats from token ") for line in lines)
    assert "a: 6 rows, 0.08 epochs, never repeats" in table(open_preview(data, tokens=10 * 16))


def test_the_command(data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "data": {
            "sources": [vars(source) for source in data.sources],
            "weight_changes": [{"at_tokens": 800, "weights": {"a": 0, "b": 0, "c": 1}}],
            "sequence_length": 16,
        },
        "training": {"train_tokens": 1600},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    report, png = tmp_path / "new/mix.json", tmp_path / "new/mix.png"
    assert main(["mix-preview", "--config", str(tmp_path / "run.yaml"), "--json", str(report), "--png", str(png)]) == 0
    raw = json.loads(report.read_text())
    assert (raw["rows"], raw["tokens"], raw["sequence_length"]) == (100, 1600, 16)
    assert [source["rows"] for source in raw["sources"]] == [30, 15, 55]
    assert raw["prefixes"][-1]["share"] == {"a": 0.30, "b": 0.15, "c": 0.55}
    assert raw["largest_deviation_rows"] == max(source["largest_deviation_rows"] for source in raw["sources"])
    assert png.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    sources = itertools.chain.from_iterable(
        ("--source", f"{source.name}={source.path}:{source.weight}") for source in data.sources
    )
    assert main(["mix-preview", *sources, "--tokens", "1_600", "--sequence-length", "16", "--packing", "pad"]) == 0
    assert "c: 10 rows, 3.33 epochs" in capsys.readouterr().out


def test_sources_are_parsed() -> None:
    assert parse_source("web=s3://bucket:80/x=y:0.5") == SourceConfig("web", "s3://bucket:80/x=y", 0.5)
    for text in ("web", "web=data", "=data:1", "web=:1", "web=data:x", "web=data:-1", "web=data:nan", "web=data:inf"):
        with pytest.raises(UserError, match=r"--source .* is not NAME=DIR:WEIGHT"):
            parse_source(text)


def test_bad_input_is_refused(data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = data.sources[:2]
    write_dataset(tmp_path / "tiny", numbered_documents([3]))
    cases = [
        (replace(data, sources=[one, replace(two, name="a")]), 1600, "are named a, a"),
        (replace(data, sources=[one, replace(two, path=str(tmp_path))]), 1600, "not a finished dataset"),
        (replace(data, sources=[one, SourceConfig("t", str(tmp_path / "tiny"))]), 1600, "too few for one row of 17"),
        (replace(data, sources=[replace(one, weight=0.0)]), 1600, "all 0"),
        (replace(data, weight_changes=[WeightChange(160, {"a": 1.0})]), 1600, "weights are given for a"),
        (replace(data, sequence_length=0), 1600, "--sequence-length is 0"),
        (data, 15, "less than one row"),
    ]
    for bad, tokens, message in cases:
        with pytest.raises(UserError, match=message):
            open_preview(bad, tokens)
    manifest = read_manifest(Path(two.path))
    other = replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0" * 64))
    (Path(two.path) / MANIFEST_FILE).write_bytes(manifest_bytes(other))
    with pytest.raises(UserError, match="need the same tokenizer"):
        open_preview(data, 1600)
    (tmp_path / "empty.yaml").write_text("{}")
    for arguments, message in (
        (["--source", f"a={one.path}:1"], "--tokens is missing"),
        (["--config", str(tmp_path / "none.yaml")], "cannot read the config"),
        (["--config", str(tmp_path / "empty.yaml")], "names no training data"),
    ):
        assert main(["mix-preview", *arguments]) == 2
        assert message in capsys.readouterr().err
