"""The paper's runs (arXiv 2511.05963), as configs: the numbers of its table, and the sizes of the tasks' documents."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.config.load import load_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.tasks import Task, make_task, vocab_size

PAPER = Path(__file__).parents[2] / "configs" / "paper"
# steps, batch, lr, weight decay, clip (0: none), layers, heads, hidden, lambda_h, lambda_kl, predictor, horizon
TABLE = {
    "path_star": (20_000, 512, 5e-4, 0.1, 100, 12, 6, 384, 1, 1, 384, 3),
    "countdown": (100_000, 1024, 3e-4, 0.1, 1, 12, 12, 768, 2, 1, 768, 8),
    "a5": (400_000, 1024, 1e-4, 0.01, 1, 2, 8, 512, 1, 0, 1024, 1),
    "manhattan": (400_000, 256, 1e-4, 0.01, 0, 48, 8, 384, 1, 0.1, 1536, 8),
    "tinystories": (100_000, 256, 3e-4, 0.1, 1, 8, 8, 768, 1, 1, 2048, 8),
}
FFN = {"path_star": 1024, "countdown": 2048, "a5": 1408, "manhattan": 1024, "tinystories": 2048}
# Documents that `nextlat-data task` is to draw: training, test.
DOCUMENTS = {"path_star": ("200_000", "20_000"), "countdown": ("500_000", "10_000"), "a5": ("1_000_000", "10_000")}


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(PAPER / f"{name}.yaml", list(overrides), world_size=1)


def data_command(name: str) -> tuple[str, dict[str, list[str]]]:
    """The task and the options of the `nextlat-data task` that the config's comment gives."""
    text = (PAPER / f"{name}.yaml").read_text().replace("\\\n#", "")
    (command,) = re.findall(r"^# +nextlat-data task (.+)$", text, flags=re.MULTILINE)
    task, *words = shlex.split(command)
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            options[word[2:].replace("-", "_")] = []
        else:
            options[list(options)[-1]].append(word)
    return task, options


def task_of_config(name: str, **changes: Any) -> Task:
    task, options = data_command(name)
    parameters: dict[str, Any] = {}
    for key, values in options.items():
        if key not in ("train", "test", "output"):
            numbers = [int(value) if value.isdigit() else value for value in values]
            parameters[key] = numbers if key == "test_length" else numbers[0]
    return make_task(task, parameters | changes)


def test_the_table_has_every_config() -> None:
    assert {path.stem for path in PAPER.glob("*.yaml")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_numbers_are_the_papers(name: str) -> None:
    config = load(name)
    model, objective, optimizer = config.model, config.objective, config.optimizer
    assert (
        config.total_steps,
        config.training.global_batch_size,
        optimizer.lr,
        optimizer.weight_decay,
        optimizer.clip_grad,
        model.num_layers,
        model.num_attention_heads,
        model.hidden_size,
        objective.lambda_hidden,
        objective.lambda_kl,
        config.predictor_hidden_size,
        objective.horizon,
    ) == TABLE[name]
    assert config.training.train_tokens == config.total_steps * config.tokens_per_step
    assert (config.schedule.name, config.schedule.warmup_tokens, optimizer.betas) == ("constant", 0, [0.9, 0.95])
    assert (objective.name, model.ffn_size, model.tie_embeddings) == ("nextlat", FFN[name], False)
    assert config.training.global_batch_size % config.training.micro_batch_size == 0


@pytest.mark.parametrize("name", TABLE)
def test_the_twin_of_the_comment_is_a_run_of_its_own(name: str) -> None:
    text = (PAPER / f"{name}.yaml").read_text()
    (overrides,) = re.findall(r"objective\.name=next_token output_dir=\S+?(?=\.?\s)", text)
    twin = load(name, *overrides.split())
    assert (twin.objective.name, twin.output_dir) == ("next_token", f"runs/paper/{name}_gpt")
    assert load(name).output_dir == f"runs/paper/{name}"


@pytest.mark.parametrize("name", ["path_star", "countdown", "a5"])
def test_rows_hold_one_document_of_the_task(name: str) -> None:
    config, task = load(name), task_of_config(name)
    _, options = data_command(name)
    assert (*options["train"], *options["test"]) == DOCUMENTS[name]
    assert options["output"] == [str(Path(config.data.train or "").parent)]
    assert config.data.packing == "pad"
    assert config.model.vocab_size == vocab_size(task)
    rng = np.random.default_rng(0)
    lengths = {len(task.sample(rng, "train").tokens) for _ in range(50)}
    assert max(lengths) == config.data.sequence_length + 1
    tested = max(len(task.sample(rng, "test").tokens) for _ in range(50))
    assert tested <= config.max_position_embeddings + 1


def check_city(config: RunConfig, **changes: Any) -> None:
    task = task_of_config("manhattan", **changes)
    assert config.data.packing == "pad"
    assert config.model.vocab_size == vocab_size(task)
    turns = task.parameters["max_turns"]
    assert config.data.sequence_length + 1 == 3 + turns + 1  # BOS, pickup, drop-off; EOS


def test_rows_hold_one_trip_of_a_city() -> None:
    """A city of the same options with fewer intersections: the true one takes minutes to draw."""
    config = load("manhattan")
    config.model.vocab_size -= 68 * 68 - 4 * 5
    check_city(config, rows=4, columns=5)


@pytest.mark.slow
def test_rows_hold_one_trip_of_the_city() -> None:
    check_city(load("manhattan"))
