"""Formats are promises: datasets, a checkpoint and exports that an earlier release wrote are read as it read them.

`tests/fixtures/formats/README.md` says what they are and how they were written.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_tools.verify import verify
from nextlat_dist.checkpoint.commit import find_checkpoint
from nextlat_dist.checkpoint.commit import verify as verify_checkpoint
from nextlat_dist.checkpoint.tensors import TensorReader
from nextlat_dist.data.loader import Cursor, RowBatch, RowLoader, Source
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.inference import load
from nextlat_dist.tasks import task_of
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training

FORMATS = Path(__file__).parent / "fixtures" / "formats"
EXPECTED: dict[str, Any] = json.loads((FORMATS / "expected.json").read_text())
DATASETS = [name for name in EXPECTED["datasets"] if "/" in name or name == "adopted"]


def records_of(name: str) -> Records:
    return Records(open_storage(FORMATS / name), read_manifest(FORMATS / name))


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_whole(name: str) -> None:
    expected, found = EXPECTED["datasets"][name], verify(str(FORMATS / name))
    assert found.problems == []
    assert read_manifest(FORMATS / name).digest == expected["digest"]
    counts = {"records": found.records, "documents": found.documents, "tokens": found.tokens}
    assert counts == expected["totals"]


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "adopted"])
def test_every_record_is_what_it_was(name: str) -> None:
    records, found = records_of(name), []
    for number in range(len(records)):
        members = {k: np.load(io.BytesIO(data)) for k, data in records.read(number).members().items()}
        found += [{"name": member, "values": array.tolist()} for member, array in members.items()]
    expected = [
        {**member, "name": member["name"].partition(".")[2]}
        for member in EXPECTED["datasets"][name]["members"]
        if not member["name"].endswith("beliefs.npy")
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_beliefs_are_next_to_the_tokens() -> None:
    with tarfile.open(FORMATS / "beliefs/test/test-000000.tar") as tar:
        (member,) = [member for member in tar if member.name.endswith(".beliefs.npy")]
        content = tar.extractfile(member)
        assert content is not None
        beliefs = np.load(io.BytesIO(content.read()))
    (expected,) = [m for m in EXPECTED["datasets"]["beliefs/test"]["members"] if m["name"] == member.name]
    assert beliefs.dtype == np.float32
    np.testing.assert_allclose(beliefs, expected["values"], atol=1e-6)
    assert beliefs.shape[0] == EXPECTED["datasets"]["beliefs/test"]["totals"]["tokens"]


@pytest.mark.parametrize(("name", "task"), [("beliefs/train", "hmm"), ("labels/test", "state-tracking")])
def test_a_tasks_dataset_says_what_it_was_drawn_from(name: str, task: str) -> None:
    manifest = read_manifest(FORMATS / name)
    found = task_of(manifest)
    assert found.name == task
    assert found.parameters == manifest.report["task"]["parameters"]


def rows_of(batch: RowBatch) -> dict[str, Any]:
    return {name: getattr(batch, name).tolist() for name in ("tokens", "document_ids", "loss_mask", "targets")}


def mixture(cursor: Cursor, rank: int = 0, ranks: int = 1) -> RowLoader:
    return RowLoader(
        [Source("questions", FORMATS / "data/train", 0.75), Source("adopted", FORMATS / "adopted", 0.25)],
        sequence_length=32,
        packing="concat",
        global_batch_size=4,
        seed=3,
        shuffle=True,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        cursor=cursor,
    )


def test_a_mixture_gives_the_same_batches() -> None:
    expected, loader = EXPECTED["datasets"]["mixture"], mixture(Cursor())
    assert [rows_of(loader.next_batch()) for _ in range(4)] == expected["batches"]
    assert loader.cursor.to_json() == expected["cursor"]


def test_an_old_cursor_is_continued_on_other_ranks() -> None:
    cursor = Cursor.from_json(EXPECTED["datasets"]["mixture"]["cursor"])
    whole = mixture(cursor).next_batch()
    halves = [
        mixture(Cursor.from_json(EXPECTED["datasets"]["mixture"]["cursor"]), rank, 2).next_batch() for rank in (0, 1)
    ]
    fifth = mixture(Cursor())
    for _ in range(4):
        fifth.next_batch()
    assert rows_of(fifth.next_batch()) == rows_of(whole)
    assert np.concatenate([half.tokens for half in halves]).tolist() == whole.tokens.tolist()


def test_padded_rows_with_labels_are_the_same() -> None:
    expected = EXPECTED["datasets"]["padded"]
    settings: dict[str, Any] = {"global_batch_size": 4, "seed": 3, "shuffle": True}
    loader = RowLoader(
        FORMATS / "labels/train",
        sequence_length=16,
        packing="pad",
        data_parallel_rank=0,
        data_parallel_size=1,
        **settings,
    )
    assert [rows_of(loader.next_batch())] == expected["batches"]
    assert loader.cursor.to_json() == expected["cursor"]


def assert_sums(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, list[float]]) -> None:
    """`expected`: sum and absolute sum of each tensor, in float64."""
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        sums = [float(tensor.double().sum()), float(tensor.double().abs().sum())]
        assert sums == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_a_checkpoint_of_two_ranks_is_read_whole() -> None:
    checkpoint = find_checkpoint(FORMATS / "run/checkpoints")
    assert checkpoint is not None
    assert verify_checkpoint(checkpoint)["step"] == EXPECTED["checkpoint"]["step"]
    with TensorReader(checkpoint) as reader:
        tensors = {
            f"{name}/{key}": reader.full(name, key)
            for name in reader.names
            for key in ("weight", "exp_avg", "exp_avg_sq")
        }
    assert_sums(tensors, EXPECTED["checkpoint"]["tensors"])
    assert json.loads((checkpoint / "trainer_state.json").read_text()) == EXPECTED["checkpoint"]["trainer_state"]


def test_an_old_run_is_continued_on_one_rank(tmp_path: Path, one_rank: Ranks) -> None:
    """The steps after the checkpoint have the losses that the old code's own two ranks had."""
    shutil.copytree(FORMATS / "run", tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()  # it has the old code's steps 59 and 60
    raw = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    raw["output_dir"] = str(tmp_path / "run")
    raw["data"] |= {"train": str(FORMATS / "data/train"), "validation": str(FORMATS / "data/validation")}
    raw["parallel"]["tensor_model_parallel_size"] = 1
    one_rank.run(run_training, raw)
    found = logged(tmp_path / "run")
    expected = {line["step"]: line for line in EXPECTED["checkpoint"]["metrics_after"] if "loss" in line}
    assert set(expected) == {59, 60}
    for step, line in expected.items():
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        assert {key: found[step][key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


@pytest.mark.parametrize(("name", "folder"), [("export", "latent_predictor"), ("mtp_export", "mtp")])
def test_an_export_is_decoded_to_the_same_tokens(name: str, folder: str) -> None:
    expected, directory = EXPECTED["exports"][name], FORMATS / name
    assert_sums(load_file(directory / "model.safetensors"), expected["weights"])
    assert_sums(load_file(directory / folder / "model.safetensors"), expected["drafter"])
    decoder = load(directory, "cpu")
    prompts = [decoder.encode(prompt) for prompt in expected["prompts"]]
    assert prompts == expected["prompt_ids"]
    count = len(expected["continuations"][0])
    for length, cycles in {"0": None, **expected["cycles"]}.items():
        found = decoder.generate(prompts, max_new_tokens=count, draft_length=int(length), ignore_eos=True)
        assert [generation.token_ids for generation in found] == expected["continuations"]
        assert cycles is None or [generation.cycles for generation in found] == cycles
    texts = [decoder.continuation_text(p, c) for p, c in zip(prompts, expected["continuations"], strict=True)]
    assert texts == expected["texts"]


def test_an_old_calibration_makes_drafting_adaptive() -> None:
    decoder = load(FORMATS / "export", "cpu")
    assert decoder.calibration is not None
    written = json.loads((FORMATS / "export/latent_predictor/calibration.json").read_text())
    assert [acceptance.temperature for acceptance in decoder.calibration.acceptance] == [0.0, 1.0]
    assert decoder.calibration.acceptance_at(0.0).confidence == written["acceptance"][0]["confidence"]
    expected = EXPECTED["exports"]["export"]
    (found,) = decoder.generate(
        expected["prompt_ids"][:1], max_new_tokens=len(expected["continuations"][0]), ignore_eos=True
    )
    assert found.token_ids == expected["continuations"][0]
