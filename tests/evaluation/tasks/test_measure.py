"""`nextlat evaluate task` on tiny exports: side by side, runs pooled, and what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.command import add_command
from nextlat_dist.evaluation.tasks.measure import evaluate_task
from nextlat_dist.evaluation.tasks.page import pooled, rows_of, solved_shares, summarise, task_report
from nextlat_dist.evaluation.tasks.scores import Curve, Scores, Share
from nextlat_dist.reporting.publish import write_pictures
from nextlat_dist.tasks import vocab_size
from nextlat_dist.tasks.city import City
from nextlat_dist.tasks.hmm import Hmm
from nextlat_dist.tasks.path_star import PathStar
from nextlat_dist.tasks.state_tracking import StateTracking
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export
from tests.kit.task_exports import write_test_set

STAR = PathStar(arms=2, length=4, nodes=20)
GROUP = StateTracking(length=5, group="S3", test_length=(20,))


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["task", *arguments])
    options.run_command(options)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of random weights: two with a predictor, one without, that know the words of both tasks."""
    found = {}
    config = tiny_config(vocab_size=max(vocab_size(STAR), vocab_size(GROUP)), max_position_embeddings=24)
    for seed, name in enumerate(("first", "second", "plain")):
        predictor = None if name == "plain" else random_predictor(config.hidden_size)
        directory = tmp_path_factory.mktemp(name)
        found[name] = write_export(directory, config, random_weights(config, seed), predictor)
    return found


@pytest.fixture(scope="module")
def stars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_set(tmp_path_factory.mktemp("stars"), STAR, 30)


def test_state_tracking_end_to_end(
    exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_test_set(tmp_path / "test", GROUP, 30)
    named = [f"gpt={exports['plain']}", f"nextlat={exports['first']}", f"nextlat={exports['second']}"]
    run("--export", *named, "--data", str(data), "--json", str(tmp_path / "out.json"), "--pictures", str(tmp_path))
    content = json.loads((tmp_path / "out.json").read_text())
    summary = content["summary"]
    assert summary["documents"] == 30
    assert summary["guess_transformer_3x"] == pytest.approx(1 / 6)
    assert "gpt_latent_rnn_3x" not in summary
    for number in ("transformer_1x", "latent_rnn_4_3x", "latent_rnn_whole_2x", "latent_rnn_3x"):
        runs = [row["value"] for row in content["rows"] if row.get("number") == number and row["export"] == "nextlat"]
        assert len(runs) == 2
        assert summary[f"nextlat_{number}"] == pytest.approx(sum(runs) / 2)
        assert summary[f"nextlat_{number}_lowest"] == min(runs)
        assert summary[f"nextlat_{number}_highest"] == max(runs)
    points = [row for row in content["rows"] if row.get("curve") == "latent_rnn" and row["run"] == 1]
    assert [row["position"] for row in points] == list(range(1, 21))
    assert (tmp_path / "accuracy_by_length.png").stat().st_size > 1000
    assert "nextlat, 2 runs" in capsys.readouterr().out


def test_path_star_end_to_end(exports: dict[str, Path], stars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    how = ["--documents", "20", "--temperature", "0,0.5", "--seed", "7"]
    run(
        *("--export", f"a={exports['first']}", f"b={exports['plain']}", "--data", str(stars), *how),
        *("--json", str(out), "--pictures", str(tmp_path)),
    )
    content = json.loads(out.read_text())
    assert (content["options"]["temperatures"], content["options"]["seed"]) == ([0.0, 0.5], 7)
    summary = content["summary"]
    assert summary["documents"] == 20
    for number in ("exact_greedy", "arm_greedy", "exact_t0.5", "arm_t0.5", "arm_teacher_forced"):
        assert summary[f"guess_{number}"] == 0.5
        assert 0 <= summary[f"a_{number}"] <= 1
    assert summary["b_arm_greedy"] == next(
        row["value"]
        for row in content["rows"]
        if row.get("curve") == "greedy" and row["position"] == 2 and row["export"] == "b"
    )
    assert (tmp_path / "accuracy_by_position.png").stat().st_size > 1000


def test_city_end_to_end(tmp_path: Path) -> None:
    city = City(rows=3, columns=3)
    data = write_test_set(tmp_path / "test", city, 8)
    config = tiny_config(vocab_size=vocab_size(city), max_position_embeddings=24)
    export = write_export(tmp_path / "export", config, random_weights(config), None)
    report = evaluate_task([f"a={export}", f"a={export}"], data, progress=False)
    assert {"a_valid_greedy", "a_valid_t1_lowest", "a_compression_greedy"} <= report.summary.keys()
    assert report.pictures.keys() == {"accuracy_by_position.png", "map.png"}
    write_pictures(report, tmp_path)
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_single_run_has_its_documents_interval_and_several_their_spread() -> None:
    runs = [Scores({"right": Share(8, 10), "plain": 2.0}), Scores({"right": Share(3, 10), "plain": 4.0})]
    alone = pooled(runs[:1], "right")
    assert (alone.mean, *(alone.bounds or ())) == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-5)
    both = pooled(runs, "right")
    assert (both.mean, both.bounds, both.n) == (pytest.approx(0.55), (0.3, 0.8), 2)
    plain = pooled(runs[:1], "plain")
    assert (plain.mean, plain.bounds, plain.n) == (2.0, None, 1)
    assert summarise({"a": runs}) == pytest.approx(
        {
            "a_right": 0.55,
            "a_right_lowest": 0.3,
            "a_right_highest": 0.8,
            "a_plain": 3.0,
            "a_plain_lowest": 2.0,
            "a_plain_highest": 4.0,
        }
    )


def test_rows_tell_every_number_and_point() -> None:
    scores = Scores({"right": Share(1, 4), "plain": 2.0}, {"line": Curve(3, (Share(4, 4), Share(1, 2)))})
    rows = [row.to_json() for row in rows_of({"a": [scores]})]
    assert [{key: row[key] for key in row if key not in ("low", "high")} for row in rows] == [
        {"export": "a", "run": 0, "number": "right", "value": 0.25, "documents": 4},
        {"export": "a", "run": 0, "number": "plain", "value": 2.0},
        {"export": "a", "run": 0, "curve": "line", "position": 3, "value": 1.0, "documents": 4},
        {"export": "a", "run": 0, "curve": "line", "position": 4, "value": 0.5, "documents": 2},
    ]


def test_runs_of_one_name_are_models_of_one_kind(exports: dict[str, Path], tmp_path: Path) -> None:
    data = write_test_set(tmp_path, GROUP, 5)
    with pytest.raises(UserError, match="only one of them has a latent predictor"):
        evaluate_task([f"a={exports['plain']}", f"a={exports['first']}"], data)


def test_an_export_of_other_tokens_is_refused(tmp_path: Path, stars: Path) -> None:
    config = tiny_config(vocab_size=10)
    write_export(tmp_path, config, random_weights(config), None)
    with pytest.raises(UserError, match=r"knows 10 token ids, but .* has 27"):
        evaluate_task([str(tmp_path)], stars)


def test_a_directory_that_is_no_export_is_refused(tmp_path: Path, stars: Path) -> None:
    with pytest.raises(UserError, match=r"is not an export"):
        evaluate_task([str(tmp_path)], stars)


def test_a_negative_temperature_is_refused(exports: dict[str, Path], stars: Path) -> None:
    with pytest.raises(UserError, match="temperature is -1"):
        evaluate_task([str(exports["plain"])], stars, documents=2, temperatures=(-1.0,))


def test_a_hidden_process_is_for_another_command(exports: dict[str, Path], tmp_path: Path) -> None:
    data = write_test_set(tmp_path, Hmm(process="even", length=16), 5)
    with pytest.raises(UserError, match="evaluate belief"):
        evaluate_task([str(exports["plain"])], data)


def test_the_share_of_runs_that_solve_a_task_has_its_interval() -> None:
    """Wilson's interval of 6 of 8, by hand: (0.4093, 0.9285)."""
    found = [0.9, 1.0, 0.95, 0.52, 0.91, 0.899, 0.97, 0.98]
    runs = {"a": [Scores({"exact_greedy": Share(round(1000 * x), 1000)}) for x in found], "b": [Scores({"plain": 1.0})]}
    shares = solved_shares(runs, ("exact_greedy", 0.9))
    assert shares == {"a": Share(6, 8)}
    assert shares["a"].interval == pytest.approx((0.40927, 0.92852), abs=1e-5)
    report = task_report({}, STAR, runs, 1000, {}, ("exact_greedy", 0.9))
    assert report.summary["a_solved_share"] == 0.75
    assert "6 of 8 (0.41–0.93)" in report.text
    assert "solved" not in str(task_report({}, STAR, runs, 1000, {}).summary)
