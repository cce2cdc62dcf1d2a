"""A resume at the same topology continues bit-identically: losses, gradient norms and final weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nextlat_dist.checkpoint.rng import rng_file
from nextlat_dist.data.loader import Cursor
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one-rank": (1, {"zero_stage": 0}, {}),
    "dp2-zero1-bf16": (2, {"zero_stage": 1}, {"precision": "bf16"}),
    "dp2-zero2": (2, {"zero_stage": 2}, {}),
    "dp2-zero3-bf16": (2, {"zero_stage": 3}, {"precision": "bf16"}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 1}, {}),
    "pp2-bf16": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 1}, {"precision": "bf16"}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 0}, {}),
}
SLOW_LAYOUTS = {"one-rank", "dp2-zero2", "tp2"}  # the others have each of their parts


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_LAYOUTS else ()) for name in LAYOUTS]
)
def test_resume_is_bit_identical(
    layout: str, tmp_path: Path, text_dataset: Path, request: pytest.FixtureRequest
) -> None:
    size, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ranks.run(run_training, training_config(whole, text_dataset, parallel, training))

    (cut / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_00000003", cut / "checkpoints" / "step_00000003")
    (cut / "checkpoints" / "latest").write_text("step_00000003\n")
    # What the lost run logged after its last checkpoint must go.
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(lines[:4]) + '\n{"step": 5, "loss"')
    ranks.run(run_training, training_config(cut, text_dataset, parallel, training))

    assert sorted(logged(whole)) == sorted(logged(cut)) == [1, 2, 3, 4, 5, 6]
    assert logged(whole) == logged(cut)
    final = Path("checkpoints/step_00000006")
    for folder in ("weights", "optimizer"):
        files = sorted(p.name for p in (whole / final / folder).iterdir())
        assert len(files) == size
        for file in files:
            before, after = ((run / final / folder / file).read_bytes() for run in (whole, cut))
            assert before == after, file
    for rank in range(size):
        with (
            safe_open(whole / final / rng_file(rank), "pt") as one,
            safe_open(cut / final / rng_file(rank), "pt") as two,
        ):
            assert one.metadata() == two.metadata()
            assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in ("torch", "numpy"))


def test_resume_reads_the_next_rows_not_the_first_ones(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    """The negative control of the test above: with the data cursor lost, the losses differ."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one_rank.run(run_training, training_config(whole, text_dataset, {"zero_stage": 0}, {}))
    (cut / "checkpoints").mkdir(parents=True)
    checkpoint = cut / "checkpoints" / "step_00000003"
    shutil.copytree(whole / "checkpoints" / "step_00000003", checkpoint)
    (cut / "checkpoints" / "latest").write_text("step_00000003\n")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["cursor"] == {"row": 12, "taken": {"train": 12}, "quarantined": {}}
    _rewrite(checkpoint, "trainer_state.json", json.dumps({**state, "cursor": Cursor().to_json()}))
    one_rank.run(run_training, training_config(cut, text_dataset, {"zero_stage": 0}, {}))
    assert logged(whole)[4]["loss"] != logged(cut)[4]["loss"]


def _rewrite(checkpoint: Path, name: str, text: str) -> None:
    """Change a file and its entry in the manifest."""
    import hashlib

    from nextlat_dist.checkpoint.commit import manifest_digest

    (checkpoint / name).write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest["digest"] = manifest_digest(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
