"""The calibration file, and reading costs and acceptance between the measured points."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.inference import load
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration, Costs
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export

COSTS = Costs({1: 0.1, 4: 0.25}, {1: {1: 1.0, 3: 1.4, 5: 2.0}, 4: {1: 2.0, 5: 6.0}}, {1: 0.2, 4: 0.6})
CALIBRATION = Calibration(
    "cpu",
    COSTS,
    [Acceptance(0.0, [0.8, 0.7], [0.1, 0.9, -0.2]), Acceptance(1.0, [0.5], [0.0, 1.0, 0.0])],
    {"threads": 1},
)


def test_costs_lie_on_lines_between_measurements() -> None:
    at_one = COSTS.at(1, 6)
    assert at_one.draft == pytest.approx(0.1)
    assert at_one.verify == pytest.approx([1.0, 1.2, 1.4, 1.7, 2.0, 2.3, 2.6])
    at_four = COSTS.at(4, 4)
    assert at_four.draft == pytest.approx(0.125)
    assert at_four.begin == pytest.approx(0.3)
    assert at_four.verify == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    between = COSTS.at(2, 2)  # plain 4/3, draft 0.15, width 3: 1.4 and 4.0
    assert between.draft == pytest.approx(0.15 / (4 / 3))
    assert between.verify[2] == pytest.approx((1.4 + (4.0 - 1.4) / 3) / (4 / 3))
    beyond = COSTS.at(7, 0)
    assert beyond.draft == pytest.approx(0.4 / 3.0)


def test_acceptance_given_confidence() -> None:
    identity = Acceptance(1.0, [0.5], [0.0, 1.0, 0.0])
    assert identity.given(0.3, 1) == pytest.approx(0.3)
    assert identity.given(0.3, 7) == pytest.approx(0.3)
    assert 0 < identity.given(0.0, 1) < identity.given(1.0, 1) < 1
    falling = Acceptance(1.0, [0.5], [0.0, 1.0, -1.0])
    assert falling.given(0.5, 3) == pytest.approx(0.25)  # odds 1 at position 1, 1/3 at position 3
    assert CALIBRATION.acceptance_at(0.4) is CALIBRATION.acceptance[0]
    assert CALIBRATION.acceptance_at(0.6) is CALIBRATION.acceptance[1]


def test_sampled_cycles_have_their_own_costs(tmp_path: Path) -> None:
    sampled = Costs({1: 0.9}, {1: {1: 1.0, 9: 5.0}}, {1: 0.1})
    both = replace(CALIBRATION, sampled_costs=sampled)
    both.save(tmp_path)
    assert Calibration.load(tmp_path) == both
    assert AdaptivePolicy(both, 0.0, 1, 4).draft == pytest.approx(0.1)
    assert AdaptivePolicy(both, 0.7, 1, 4).draft == pytest.approx(0.9)
    assert AdaptivePolicy(CALIBRATION, 0.7, 1, 4).draft == pytest.approx(0.1), "older files have one kind"


def test_a_file_of_an_older_release_is_read(tmp_path: Path) -> None:
    """It had no costs of sampled cycles, and no top_k and top_p."""
    path = CALIBRATION.save(tmp_path)
    raw = json.loads(path.read_text())
    raw.pop("sampled_costs", None)
    for entry in raw["acceptance"]:
        del entry["top_k"], entry["top_p"]
    path.write_text(json.dumps(raw))
    assert Calibration.load(tmp_path) == CALIBRATION


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert Calibration.load(tmp_path) is None
    assert CALIBRATION.save(tmp_path) == tmp_path / "calibration.json"
    assert Calibration.load(tmp_path) == CALIBRATION
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("damage", ["text", "version", "acceptance", "costs", "field"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path = CALIBRATION.save(tmp_path)
    raw = json.loads(path.read_text())
    if damage == "version":
        raw["format_version"] = 99
    elif damage == "acceptance":
        raw["acceptance"] = []
    elif damage == "costs":
        del raw["costs"]["verify"]["1"]["1"]
    elif damage == "field":
        del raw["costs"]["draft"]
    path.write_text("{" if damage == "text" else json.dumps(raw))
    with pytest.raises(UserError, match=r"calibration\.json is not a calibration .*nextlat calibrate"):
        Calibration.load(tmp_path)


def test_a_damaged_file_stops_adaptive_drafting_only(tmp_path: Path) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    (tmp_path / "latent_predictor" / "calibration.json").write_text("{")
    decoder = load(tmp_path, "cpu")
    assert decoder.generate([[1]], max_new_tokens=9, draft_length=2, ignore_eos=True)[0].drafted > 0
    with pytest.raises(UserError, match="is not a calibration"):
        decoder.generate([[1]], max_new_tokens=2, draft_length="adaptive")


def test_adaptive_needs_a_calibration_of_this_kind_of_device(tmp_path: Path) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    decoder = load(tmp_path, "cpu")
    with pytest.raises(UserError, match="is not calibrated; run `nextlat calibrate`"):
        decoder.generate([[1]], max_new_tokens=2, draft_length="adaptive")
    assert decoder.generate([[1]], max_new_tokens=9, ignore_eos=True)[0].drafted > 0  # 3, as not calibrated
    Calibration("cuda", COSTS, CALIBRATION.acceptance).save(tmp_path / "latent_predictor")
    with pytest.raises(UserError, match="was calibrated on cuda, but runs on cpu"):
        load(tmp_path, "cpu").generate([[1]], max_new_tokens=2, draft_length="adaptive")


def test_adaptive_needs_a_calibration_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default falls back to a fixed length and says so; asked for by name it is refused."""
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    here = load(tmp_path, "cpu").machine_facts
    folder = tmp_path / "latent_predictor"
    for changed, sentence in (
        ({"cpu": "Abacus 3000"}, "was calibrated on Abacus 3000, but runs on"),
        ({"torch_threads": 99}, "was calibrated on 99 threads, but runs on"),
        ({"dtype": "bfloat16"}, "was calibrated on bfloat16, but runs on float32"),
    ):
        replace(CALIBRATION, measured_on=here | changed).save(folder)
        decoder = load(tmp_path, "cpu")
        with pytest.raises(UserError, match=f"{sentence}.*run `nextlat calibrate`"):
            decoder.generate([[1]], max_new_tokens=2, draft_length="adaptive")
        (row,) = decoder.generate([[1]], max_new_tokens=9, ignore_eos=True)
        assert len(row.drafted_by_position) == 3
        assert sentence in capsys.readouterr().err
    for known in (here, {}, {"prompts": 3}):
        replace(CALIBRATION, measured_on=known).save(folder)
        load(tmp_path, "cpu").generate([[1]], max_new_tokens=2, draft_length="adaptive")


def test_drafts_observed_at_other_settings_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    sampled = Acceptance(1.0, [0.5], [0.0, 1.0, 0.0], top_p=0.9)
    replace(CALIBRATION, acceptance=[CALIBRATION.acceptance[0], sampled]).save(tmp_path / "latent_predictor")
    decoder = load(tmp_path, "cpu")
    as_calibrated = {"temperature": 1.0, "top_p": 0.9, "draft_length": "adaptive", "max_new_tokens": 2}
    for settings in (as_calibrated, {**as_calibrated, "temperature": 0.0, "top_p": 1.0}):
        decoder.generate([[1]], **settings)
    assert "was calibrated with" not in capsys.readouterr().err
    for _ in range(2):
        decoder.generate([[1]], **{**as_calibrated, "top_p": 1.0, "top_k": 5})
    said = capsys.readouterr().err
    assert said.count("was calibrated with top_k 0 and top_p 0.9, but samples with top_k 5 and top_p 1: ") == 1
    assert "run `nextlat calibrate --top-k 5 --top-p 1`" in said
