"""The belief report as a whole: controls pass and fail everything, page and numbers agree, mistakes are named."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.tasks import TaskOptions, write_task
from nextlat_dist.data.shard_format import MANIFEST_FILE, manifest_bytes, read_manifest
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.belief import predictor as belief_predictor
from nextlat_dist.evaluation.belief import probes as belief_probes
from nextlat_dist.evaluation.belief.command import add_command
from nextlat_dist.evaluation.belief.controls import Oracle, Shuffled
from nextlat_dist.evaluation.belief.data import Histories, read_histories
from nextlat_dist.evaluation.belief.measure import evaluate_belief
from nextlat_dist.evaluation.belief.predictor import fit_predictor
from nextlat_dist.evaluation.belief.questions import Questions
from nextlat_dist.evaluation.belief.rows import BeliefRow
from nextlat_dist.evaluation.belief.verdicts import PROPERTIES, Property, verdicts
from nextlat_dist.inference.state_model import ExportModel, StateModel
from nextlat_dist.tasks.hmm import Hmm
from nextlat_dist.tasks.path_star import PathStar
from tests.kit.exports import copying_model, random_weights, tiny_config, write_export


def histories_of(process: str, documents: int = 60) -> Histories:
    hmm = Hmm(process=process, length=32)
    rng = np.random.default_rng(0)
    tokens = np.stack([hmm.sample(rng, "test").tokens for _ in range(documents)])
    return Histories(hmm, tokens, hmm.beliefs(tokens))


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(belief_probes, "MLP_STEPS", 40)


class Collapsed:
    """All states are one, and the head knows the stationary distribution: what a latent loss alone would like best."""

    hidden_size, has_predictor = 3, True

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.vocab_size = oracle, oracle.vocab_size

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.broadcast_to(self.oracle.hmm.prior, (*tokens.shape, 3)).copy())

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.oracle.logits(states)

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return states


@pytest.mark.parametrize("process", ["mess3", "rrxor", "random"])
def test_exact_beliefs_pass_every_property_and_shuffled_ones_fail_every_one(process: str) -> None:
    histories = histories_of(process)
    questions = Questions(histories, 0)
    oracle = Oracle(histories.hmm)
    passing, failing = (questions.row(model, "x", 0, "exact") for model in (oracle, Shuffled(oracle, 0)))
    for entry in PROPERTIES:
        assert entry.holds(passing) is True, (entry.name, getattr(passing, entry.measure))
        assert entry.holds(failing) is False, (entry.name, getattr(failing, entry.measure))
        # with margin: a control is at least half of the way from the threshold to its own ideal
        good, bad = getattr(passing, entry.measure), getattr(failing, entry.measure)
        assert abs(good - entry.threshold) > 0.09
        assert abs(bad - entry.threshold) > 0.3


def test_collapsed_states_fail_every_property() -> None:
    histories = histories_of("mess3")
    model: StateModel = Collapsed(Oracle(histories.hmm))
    row = Questions(histories, 0).row(model, "collapsed", 0, "own")
    assert [entry.holds(row) for entry in PROPERTIES] == [False] * 4
    assert row.worst_kl_ratio == pytest.approx(1)
    assert row.equivalence_auc == 0.5
    assert row.transition_error == [1.0] * 16


def measured(**numbers: float | None) -> BeliefRow:
    """A row of which only these numbers matter."""
    known = {field.name: 0.5 for field in fields(BeliefRow)} | numbers
    return BeliefRow(**known)  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", PROPERTIES, ids=lambda entry: entry.name)
def test_a_property_holds_from_its_threshold_on(entry: Property) -> None:
    worse = -1e-6 if entry.at_least else 1e-6
    assert entry.holds(measured(**{entry.measure: entry.threshold})) is True
    assert entry.holds(measured(**{entry.measure: entry.threshold + worse})) is False
    assert entry.holds(measured(**{entry.measure: None})) is None


def test_verdicts_speak_for_all_runs() -> None:
    rows = [
        measured(linear_r2=r2, worst_kl_ratio=0.2, equivalence_auc=None, worst_transition_error=0.1)
        for r2 in (0.95, 0.5)
    ]
    decodable, sufficient, equivalent, consistent = verdicts("gpt", rows)
    assert "holds in 1 of 2 runs (0.950, 0.500; wanted ≥ 0.9)" in decodable
    assert "does not hold (0.200, 0.200; wanted ≤ 0.1)" in sufficient
    assert "not measured" in equivalent
    assert "consistent: holds (0.100, 0.100; wanted ≤ 0.5)" in consistent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, an export that copies its last token into its state with the right predictor, and one without any."""
    root = tmp_path_factory.mktemp("belief")
    write_task(Hmm(process="mess3", length=12), TaskOptions(root / "data", train=30, test=24))
    config = tiny_config(vocab_size=7)
    weights, predictor = copying_model(config)
    write_export(root / "copying", config, weights, predictor)
    for seed in (1, 2):
        write_export(root / f"gpt{seed}", config, random_weights(config, seed), None)
    return root


def run(options: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    parsed = parser.parse_args(["belief", *options])
    parsed.run_command(parsed)


def test_the_report_from_the_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(belief_predictor, "STEPS", 5)
    exports = ["--export", f"copy={world / 'copying'}", f"gpt={world / 'gpt1'}", f"gpt={world / 'gpt2'}"]
    where = ["--json", str(tmp_path / "belief.json"), "--pictures", str(tmp_path / "page")]
    run([*exports, "--data", str(world / "data" / "test"), *where])
    content = json.loads((tmp_path / "belief.json").read_text())
    rows, summary = content["rows"], content["summary"]
    assert [(row["model"], row["run"], row["predictor"]) for row in rows] == [
        ("copy", 0, "own"),
        ("copy", 0, "fitted"),
        ("gpt", 0, "fitted"),
        ("gpt", 1, "fitted"),
        ("oracle", 0, "exact"),
        ("shuffled", 0, "exact"),
    ]
    for row in rows:
        assert row["worst_transition_error"] == max(row["transition_error"] + row["counterfactual_error"])
        assert row["worst_kl_ratio"] == max(row["kl_ratio"])
    assert any(max(row["counterfactual_error"]) > max(row["transition_error"]) for row in rows)
    copy, fitted, *_ = rows
    assert copy["worst_transition_error"] < 1e-4  # its own predictor is right about every state
    assert fitted["worst_transition_error"] > 0.01
    assert copy["linear_r2"] == pytest.approx(copy["last_token_r2"], abs=0.02)  # its states know the last token only
    assert summary["copy_worst_transition_error"] == copy["worst_transition_error"]
    assert summary["copy_fitted_worst_transition_error"] == fitted["worst_transition_error"]
    assert summary["copy_consistent"] == 1.0
    assert summary["oracle_sufficient"] == 1.0
    assert summary["shuffled_sufficient"] == 0.0
    both = [row["linear_r2"] for row in rows if row["model"] == "gpt"]
    assert summary["gpt_linear_r2"] == pytest.approx(np.mean(both))
    assert summary["gpt_linear_r2_sd"] == pytest.approx(np.std(both, ddof=1))
    page = (tmp_path / "page" / "belief.md").read_text()
    printed = capsys.readouterr().out
    for sentence in content["verdicts"]:
        assert sentence in page
        assert sentence in printed
    assert "copy · consistent: holds" in page
    assert "fitted afterwards" in page
    for picture in ("belief_steps.png", "belief_geometry.png"):
        assert f"({picture})" in page
        assert (tmp_path / "page" / picture).stat().st_size > 5000


def test_a_model_with_its_own_predictor_needs_no_training_data(world: Path, tmp_path: Path) -> None:
    alone = tmp_path / "test"
    alone.symlink_to(world / "data" / "test")
    report = evaluate_belief([str(world / "copying")], alone, controls=False, progress=False)
    assert [row.predictor for row in report.rows] == ["own"]
    with pytest.raises(UserError, match="--fit-data"):
        evaluate_belief([str(world / "gpt1")], alone, progress=False)


def test_a_fitted_predictor_learns_the_transitions(world: Path) -> None:
    """The states of a copying model are the embedding of the last token: a lookup."""
    model = ExportModel(world / "copying", "cpu")
    tokens = torch.randint(4, 7, (200, 13), generator=torch.Generator().manual_seed(0))
    fitted = fit_predictor(model, tokens, 32, seed=0)
    states = model.states(tokens)
    error = (fitted.advance(states[:, :-1], tokens[:, 1:]) - states[:, 1:]).square().mean()
    assert float(error) < 0.02 * float(states.var())


def test_stored_beliefs_of_another_process_are_named(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "test"
    shutil.copytree(world / "data" / "test", other)
    manifest = read_manifest(other)
    manifest.report["task"]["parameters"]["x"] = 0.1501
    (other / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))
    with pytest.raises(UserError, match=r"beliefs stored in .* are not those of its process"):
        read_histories(other, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "star/test"}, "path-star"),
        ({"documents": 5}, "--documents"),
        ({"documents": 0}, "--documents"),
        ({"fit_data": "other/train"}, "same one"),
        ({"exports": ["small"]}, "knows 6 tokens"),
        ({"exports": []}, "--export"),
    ],
)
def test_mistakes_are_named(world: Path, changes: dict[str, Any], words: str) -> None:
    if not (world / "star").exists():
        write_task(PathStar(arms=2, length=3, nodes=9), TaskOptions(world / "star", train=20, test=20))
        write_task(Hmm(process="mess3", length=12, x=0.1), TaskOptions(world / "other", train=24, test=1))
        config = tiny_config(vocab_size=6)
        write_export(world / "small", config, random_weights(config), None)
    options: dict[str, Any] = {"exports": ["gpt1"], "data": "data/test", **changes}
    options["exports"] = [str(world / name) for name in options["exports"]]
    for name in ("data", "fit_data"):
        if name in options:
            options[name] = world / options[name]
    with pytest.raises(UserError, match=words):
        evaluate_belief(**options, progress=False)
