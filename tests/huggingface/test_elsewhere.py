"""An export in other people's hands: lm-evaluation-harness with no flag, a predictor next to foreign weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import load_base_weights, save_base_weights
from nextlat_dist.huggingface.drafters.latent_predictor import PREDICTOR_DIRECTORY
from nextlat_dist.inference import load
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export, write_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "return", "self", "import", "value"]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "export"
    directory.mkdir()
    config = tiny_config(vocab_size=write_tokenizer(directory))
    return write_export(directory, config, random_weights(config), random_predictor(config.hidden_size))


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Any]]:
    """Runs lm-evaluation-harness on an export: a local task of each kind that the harness has."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pick = random.Random(1)
    rows = [
        {
            "text": " ".join(pick.choices(WORDS, k=6)),
            "choices": [f" {word}" for word in pick.sample(WORDS, 4)],
            "label": pick.randrange(4),
        }
        for _ in range(16)
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "completion": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{choices[label]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, settings in kinds.items():
        data = {"data_files": {"test": str(tasks / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        source = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({**source, **settings}))

    def evaluate(directory: Path) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = simple_evaluate(
            "hf", f"pretrained={directory}", tasks=list(kinds), task_manager=manager, device="cpu", bootstrap_iters=0
        )
        assert found is not None
        answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
        return {"scores": found["results"], "answers": answers}

    return evaluate


def test_harness_scores_do_not_depend_on_the_predictor(
    export: Path, tmp_path: Path, harness: Callable[[Path], dict[str, Any]]
) -> None:
    with_predictor = harness(export)
    without = tmp_path / "without"
    shutil.copytree(export, without, ignore=shutil.ignore_patterns(PREDICTOR_DIRECTORY))
    assert (export / PREDICTOR_DIRECTORY).is_dir()
    assert not (without / PREDICTOR_DIRECTORY).exists()
    assert harness(without) == with_predictor

    scores, answers = with_predictor["scores"], with_predictor["answers"]
    assert 0 < scores["choice"]["acc,none"] < 1
    assert scores["text"]["bits_per_byte,none"] > 1
    assert {name: len(rows) for name, rows in answers.items()} == {"choice": 16, "text": 16, "completion": 16}

    weights = load_base_weights(without)
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_base_weights(without, weights)  # a small change of one matrix shows
    assert harness(without)["answers"]["choice"] != answers["choice"]


def test_a_predictor_next_to_other_base_weights_is_refused(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_base_weights(export)
    weights["model.norm.weight"][0] += 2**-20
    save_base_weights(export, weights)
    with pytest.raises(UserError, match=r"belongs to base weights \w{12}…, but .* holds \w{12}…; export base and"):
        load(export)
    assert main(["generate", "--export", str(export), "--prompt", "alpha"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {export / PREDICTOR_DIRECTORY} belongs to base weights ")
    assert errors.count("\n") == 1


def test_the_base_alone_still_loads_there(export: Path) -> None:
    shutil.rmtree(export / PREDICTOR_DIRECTORY)
    [row] = load(export, dtype=torch.float64).generate(["alpha"], max_new_tokens=3)
    assert row.drafted == 0
