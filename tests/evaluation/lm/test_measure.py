"""`nextlat evaluate lm`: the harness's scores are the model's own, side by side; what is missing is said."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.lm import command as lm_command
from nextlat_dist.evaluation.lm import measure as lm
from nextlat_dist.evaluation.lm.harness import load_tasks
from nextlat_dist.evaluation.lm.measure import PAPER_TASKS, evaluate_lm
from nextlat_dist.reporting.publish import publish
from tests.kit.exports import random_weights, reference_model, tiny_config, write_export, write_tokenizer
from tests.kit.form_exports import bst_export, jtp_export

# The choices are a token each: a longer one would always lose.
ROWS = [
    ("alpha beta gamma", ["Q", "Z", "J"], 0),
    ("return self", ["K", "X", "W"], 1),
    ("import value delta", ["J", "Q", "X"], 2),
    ("gamma alpha return", ["W", "K", "Z"], 1),
    ("self delta", ["X", "J", "K"], 0),
]
SEEDS = (1, 5)  # of exports with different accuracies


def write_task(directory: Path, name: str, data: Path, **settings: Any) -> None:
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
    }
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.yaml").write_text(yaml.safe_dump({**source, **settings}))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of choices and one of running text."""
    data = tmp_path / "rows.jsonl"
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = tmp_path / "tasks"
    choice = {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(
        directory, "pick", data, output_type="multiple_choice", target_delimiter="", metric_list=metrics, **choice
    )
    text = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    write_task(directory, "read", data, output_type="loglikelihood_rolling", **text)
    return directory


def make_export(directory: Path, seed: int) -> Path:
    directory.mkdir()
    config = tiny_config(vocab_size=write_tokenizer(directory))
    return write_export(directory, config, random_weights(config, seed), None)


class Reference:
    """The same scores from transformers' model, a text at a time."""

    def __init__(self, export: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(export))
        self.model = reference_model(export, torch.float32)

    @torch.inference_mode()
    def log_likelihood(self, context: str, text: str) -> float:
        """ln p(text | BOS context)."""
        whole, start = self.tokenizer.encode(context + text), len(self.tokenizer.encode(context))
        assert whole[0] == self.tokenizer.bos_token_id
        logits = self.model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        return float(sum(logits[t - 1, whole[t]] for t in range(start, len(whole))))

    def accuracy(self) -> float:
        right = 0
        for text, choices, label in ROWS:
            scores = [self.log_likelihood(text, choice) for choice in choices]
            right += scores.index(max(scores)) == label
        return right / len(ROWS)

    def bits_per_byte(self) -> float:
        bits = -sum(self.log_likelihood("", text) for text, _, _ in ROWS) / math.log(2)
        return bits / sum(len(text) for text, _, _ in ROWS)


def test_scores_are_those_of_the_model_side_by_side(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exports = {"one": make_export(tmp_path / "first", SEEDS[0]), "two": make_export(tmp_path / "second", SEEDS[1])}
    target = tmp_path / "lm.json"
    given = [f"{name}={export}" for name, export in exports.items()]
    report = evaluate_lm(given, ["pick", "read"], include_path=tasks, batch_size=2)
    publish(report, target)
    content = json.loads(target.read_text())
    assert content == report.content()
    shares = {}
    for name, export in exports.items():
        reference = Reference(export)
        share = shares[name] = reference.accuracy()
        assert content["summary"][f"{name}_pick_acc"] == pytest.approx(share)
        (row,) = (row for row in content["rows"] if (row["export"], row["metric"]) == (name, "acc"))
        assert row["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(ROWS) - 1)))
        assert (row["documents"], row["shots"], row["higher_is_better"]) == (5, 0, True)
        bits = content["summary"][f"{name}_read_bits_per_byte"]
        assert bits == pytest.approx(reference.bits_per_byte(), rel=1e-4)
    assert shares["one"] != shares["two"]
    assert "lm-eval" in content["versions"]
    heading, pick, *rest = capsys.readouterr().out.splitlines()
    assert heading.split() == ["task", "metric", "documents", "one", "two"]
    assert pick.split()[:3] == ["pick", "acc↑", "5"]
    assert [pick.split()[column] for column in (3, 6)] == [f"{share:.4f}" for share in shares.values()]
    assert any(line.split()[:2] == ["read", "bits_per_byte↓"] for line in rest)


@pytest.mark.parametrize("make", [jtp_export, bst_export])
def test_bases_that_are_more_than_a_llama(make: Callable[..., Path], tmp_path: Path, tasks: Path) -> None:
    tmp_path.joinpath("export").mkdir()
    export = make(tmp_path / "export", vocab_size=write_tokenizer(tmp_path / "export"), scale=0.3, seed=SEEDS[0])
    summary = evaluate_lm([f"one={export}"], ["pick", "read"], include_path=tasks).summary
    reference = Reference(export)
    assert summary["one_pick_acc"] == pytest.approx(reference.accuracy())
    assert summary["one_read_bits_per_byte"] == pytest.approx(reference.bits_per_byte(), rel=1e-4)


def test_a_limit_is_a_trial(tmp_path: Path, tasks: Path) -> None:
    report = evaluate_lm([str(make_export(tmp_path / "small", 0))], ["pick"], include_path=tasks, limit=2)
    assert [row.documents for row in report.rows] == [2]
    assert "only the first 2 documents of each task: a trial, not a score" in report.text


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = [str(make_export(tmp_path / "small", 0))]
    write_task(tasks, "gone", tmp_path / "gone.jsonl", output_type="multiple_choice", doc_to_text="")
    with pytest.raises(UserError, match=r"the data set of task gone cannot be fetched \(.*gone\.jsonl.*leave gone out"):
        evaluate_lm(export, ["pick", "gone"], include_path=tasks)
    online = {"task": "online", "dataset_path": "nobody/nothing", "test_split": "test", "output_type": "generate_until"}
    (tasks / "online.yaml").write_text(yaml.safe_dump({**online, "doc_to_text": "", "doc_to_target": ""}))
    with pytest.raises(UserError, match=r"of task online cannot be fetched \(.*'nobody/nothing'.*unset HF_HUB_OFFLINE"):
        evaluate_lm(export, ["online"], include_path=tasks)
    with pytest.raises(UserError, match=r"--include-path .*missing is no folder"):
        evaluate_lm(export, ["pick"], include_path=tmp_path / "missing")
    with pytest.raises(UserError, match=r"--batch-size is 0 and --limit None, but both must be"):
        evaluate_lm(export, ["pick"], batch_size=0)
    with pytest.raises(UserError, match=r"nowhere has no config.json; name a directory"):
        evaluate_lm([str(tmp_path / "nowhere")], ["pick"], include_path=tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(UserError, match=r"needs lm-evaluation-harness, .*pip install 'nextlat-dist\[eval\]'"):
        evaluate_lm(export, ["pick"], include_path=tasks)


@pytest.mark.slow
def test_the_papers_tasks_exist_and_an_unknown_one_names_its_neighbour() -> None:
    from lm_eval.tasks import TaskManager

    assert set(PAPER_TASKS) <= set(TaskManager().all_tasks)
    with pytest.raises(UserError, match=r"names 'hellaswags', .* the nearest name is 'hellaswag'"):
        load_tasks(["hellaswags"], None)


def test_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    lm_command.add_command(parser.add_subparsers())
    asked: list[Any] = []
    published: list[Any] = []
    monkeypatch.setattr(lm, "evaluate_lm", lambda *given, **named: asked.append((given, named)))
    monkeypatch.setattr("nextlat_dist.reporting.publish.publish", lambda *given: published.append(given))
    options = parser.parse_args(
        ["lm", "--export", "a=x", "y", "--tasks", "paper,mmlu", "--limit", "3", "--json", "out.json"]
    )
    options.run_command(options)
    ((given, named),) = asked
    assert given == (["a=x", "y"], [*PAPER_TASKS, "mmlu"])
    assert named == {"include_path": None, "limit": 3, "batch_size": 8}
    assert published == [(None, Path("out.json"))]
