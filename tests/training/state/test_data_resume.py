"""The data of real runs: the same batches when the number of ranks changes, mixtures, damage, failing readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.data.order import GlobalOrder
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config


def refused(raw: dict[str, Any]) -> str:
    """The sentence with which this rank ends."""
    try:
        run_training(raw)
    except UserError as error:
        return str(error)
    return ""


def configured(output: Path, dataset: Path, steps: int = 6, **data: Any) -> dict[str, Any]:
    raw = training_config(output, dataset, {"zero_stage": 0}, {"train_tokens": steps * 4 * 48, "validation_batches": 0})
    raw["data"] = {**raw["data"], "log_batch_hashes": True, **data}
    if "sources" in data:
        del raw["data"]["train"]
    return raw


def hashes(output: Path) -> dict[int, str]:
    """SHA-256 of the global batch of every step."""
    lines = [json.loads(line) for line in (output / "batch_hashes.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [4 * (line["step"] - 1) for line in lines]
    return {line["step"]: line["sha256"] for line in lines}


def sources(dataset: Path) -> list[dict[str, Any]]:
    return [
        {"name": "text", "path": str(dataset / "train"), "weight": 0.75},
        {"name": "held", "path": str(dataset / "validation"), "weight": 0.25},
    ]


@pytest.mark.parametrize(
    "mixed", [pytest.param(False, marks=pytest.mark.slow, id="one-source"), pytest.param(True, id="mixture")]
)
def test_another_number_of_ranks_goes_on_with_the_same_batches(
    mixed: bool, tmp_path: Path, text_dataset: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    """Two data-parallel ranks to step 3, one rank to step 6, two tensor-parallel ones to step 9: as one run on one."""
    data: dict[str, Any] = {"sources": sources(text_dataset)} if mixed else {}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one_rank.run(run_training, configured(whole, text_dataset, 9, **data))
    layouts: list[tuple[Ranks, int, dict[str, int]]] = [
        (two_ranks, 3, {"zero_stage": 2}),
        (one_rank, 6, {"zero_stage": 0}),
        (two_ranks, 9, {"zero_stage": 1, "tensor_model_parallel_size": 2}),
    ]
    for ranks, steps, parallel in layouts:
        ranks.run(run_training, configured(cut, text_dataset, steps, **data) | {"parallel": parallel})
        assert sorted(hashes(cut)) == list(range(1, steps + 1))
    assert hashes(whole) == hashes(cut)
    assert len(set(hashes(whole).values())) == 9
    before, after = logged(whole), logged(cut)
    assert sorted(after) == list(range(1, 10))
    for step, line in before.items():
        assert after[step] == pytest.approx(line, rel=1e-3), "weights and optimizer resume too"


def test_hash_log_of_tensor_and_pipeline_ranks_is_that_of_one_rank(
    tmp_path: Path, text_dataset: Path, one_rank: Ranks, four_ranks: Ranks
) -> None:
    one_rank.run(run_training, configured(tmp_path / "one", text_dataset, 3))
    for name, parallel in (("tp2", {"tensor_model_parallel_size": 2}), ("pp2", {"pipeline_model_parallel_size": 2})):
        raw = configured(tmp_path / name, text_dataset, 3)
        four_ranks.run(run_training, {**raw, "parallel": {**parallel, "zero_stage": 1}})
        assert hashes(tmp_path / name) == hashes(tmp_path / "one")


def test_weights_may_change_after_the_checkpoint_and_not_before(
    tmp_path: Path, text_dataset: Path, one_rank: Ranks
) -> None:
    row = 48
    mix = sources(text_dataset)
    one_rank.run(run_training, configured(tmp_path, text_dataset, 3, sources=mix))
    first = logged(tmp_path)
    assert first[1]["share/text"] == 0.75
    assert first[3]["epoch/text"] > first[3]["epoch/held"] / 10 > 0

    other = [{**mix[0], "weight": 0.5}, mix[1]]
    (sentence,) = one_rank.run(refused, configured(tmp_path, text_dataset, 6, sources=other))
    assert "the weights of data.sources up to row 12 are not those that this run was trained with" in sentence
    assert "a data.weight_changes entry at 576 tokens or later" in sentence

    early = [{"at_tokens": 11 * row, "weights": {"text": 0, "held": 1}}]
    (sentence,) = one_rank.run(refused, configured(tmp_path, text_dataset, 6, sources=mix, weight_changes=early))
    assert "up to row 12 are not those" in sentence

    gone = [mix[0]]
    (sentence,) = one_rank.run(refused, configured(tmp_path, text_dataset, 6, sources=gone))
    assert "source held, which this run was trained on, is gone from data.sources" in sentence

    swapped = [{**mix[0], "path": mix[1]["path"]}, {**mix[1], "path": mix[0]["path"]}]
    (sentence,) = one_rank.run(refused, configured(tmp_path, text_dataset, 6, sources=swapped))
    assert "source text is not the dataset this run was trained on (manifest" in sentence

    more = [*mix, {"name": "new", "path": mix[1]["path"], "weight": 0.0}]
    late = [{"at_tokens": 12 * row, "weights": {"text": 0, "held": 0, "new": 1}}]
    one_rank.run(run_training, configured(tmp_path, text_dataset, 6, sources=more, weight_changes=late))
    last = logged(tmp_path)[6]
    assert (last["share/text"], last["share/new"]) == (0, 1)
    assert last["epoch/text"] == first[3]["epoch/text"]
    assert last["epoch/new"] > 0


def damaged_copy(dataset: Path, target: Path, raw: dict[str, Any], place: int = 2) -> int:
    """Copy the dataset and flip a bit in the record at this place in the order of a run; the record's number."""
    shutil.copytree(dataset, target)
    train = target / "train"
    storage = Records(open_storage(train), read_manifest(train))
    seed = config_from_dict(raw).training.seed
    record = int(GlobalOrder(storage.tokens, seed=seed, shuffle=True).records(0, place)[0])
    (shard,) = train.glob("*.tar")
    with shard.open("r+b") as file:
        file.seek(int(storage._offset[record]) + 700)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    return record


def test_a_damaged_record_stops_every_rank_with_its_place(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    raw = configured(tmp_path / "run", tmp_path / "data", 40, verify="never")
    record = damaged_copy(text_dataset, tmp_path / "data", raw)
    first, second = two_ranks.run(refused, raw)
    assert first == second
    assert f"record {record} at offset" in first
    assert "train-000000.tar is damaged" in first
    raw["data"]["verify"] = "first"
    first, second = two_ranks.run(refused, raw)
    assert "train-000000.tar is not the file that the manifest describes: its sha256 differs" in first == second


def test_a_quarantined_record_is_one_for_all_ranks_and_after_a_resume(
    tmp_path: Path, text_dataset: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    dataset = tmp_path / "data"
    options = {"on_damage": "quarantine", "max_quarantined_fraction": 0.5}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    record = damaged_copy(text_dataset, dataset, configured(whole, dataset))
    one_rank.run(run_training, configured(whole, dataset, 40, **options))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if "quarantined" in line]
    assert (event["quarantined"]["source"], event["quarantined"]["record"]) == ("train", record)
    assert f"record {record} at offset" in event["quarantined"]["reason"]
    assert logged(whole)[40]["quarantined_records"] == 1
    step = event["step"]
    later = 3 * (step // 3 + 1)
    two_ranks.run(run_training, configured(cut, dataset, later, **options))
    state = json.loads((cut / "checkpoints" / f"step_{later:08d}" / "trainer_state.json").read_text())
    assert state["cursor"]["quarantined"] == {"train": [record]}
    one_rank.run(run_training, configured(cut, dataset, 40, **options))
    assert hashes(cut) == hashes(whole)


def run_on_copies(raw: dict[str, Any], copies: list[str]) -> None:
    """Every rank reads its own copy of the dataset, as hosts with local disks do."""
    import torch.distributed as dist

    run_training({**raw, "data": {**raw["data"], "train": copies[dist.get_rank()]}})


def test_damage_to_the_copy_of_one_host_counts_for_all(
    tmp_path: Path, text_dataset: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    options = {"on_damage": "quarantine", "max_quarantined_fraction": 0.5}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    record = damaged_copy(text_dataset, tmp_path / "data", configured(whole, text_dataset), place=0)
    copies = [str(text_dataset / "train"), str(tmp_path / "data" / "train")]
    two_ranks.run(run_on_copies, configured(whole, text_dataset, 9, **options), copies)
    (event,) = [json.loads(line) for line in (whole / "metrics.jsonl").open() if '"quarantined"' in line]
    assert event["step"] == 1
    steps = 3  # the record is still being read there
    two_ranks.run(run_on_copies, configured(cut, text_dataset, steps, **options), copies)
    state = json.loads((cut / "checkpoints" / f"step_{steps:08d}" / "trainer_state.json").read_text())
    assert state["cursor"]["quarantined"] == {"train": [record]}
    one_rank.run(run_training, configured(cut, text_dataset, 9, **options))  # on the good copy
    assert hashes(cut) == hashes(whole)
    clean = tmp_path / "clean"
    one_rank.run(run_training, configured(clean, text_dataset, 9, **options))
    differing = [step for step, digest in hashes(clean).items() if digest != hashes(whole)[step]]
    assert max(differing) > steps


def fail_while_reading(raw: dict[str, Any], failing_rank: int) -> str:
    """A reader that breaks in a way nobody foresaw."""
    import torch.distributed as dist

    from nextlat_dist.data.loader import RowLoader

    original = RowLoader.next_batch
    calls = 0

    def broken(self: RowLoader) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and dist.get_rank() == failing_rank:
            raise RuntimeError("the disk fell over")
        return original(self)

    RowLoader.next_batch = broken  # type: ignore[method-assign]
    try:
        return refused(raw)
    finally:
        RowLoader.next_batch = original  # type: ignore[method-assign]


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}], ids=["dp4", "tp2-dp2"])
def test_a_reader_that_breaks_ends_every_rank(
    parallel: dict[str, int], tmp_path: Path, text_dataset: Path, four_ranks: Ranks
) -> None:
    raw = configured(tmp_path, text_dataset, 6) | {"parallel": {**parallel, "zero_stage": 0}}
    answers = four_ranks.run(fail_while_reading, raw, 2)
    assert set(answers) == {"reading the data failed on rank 2: RuntimeError: the disk fell over"}
