"""Calibration: what it makes of drafts and cycles, against cases worked out by hand and against plain decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from nextlat_dist.calibration.calibrate import (
    DRAFT_LENGTH,
    calibrate,
    drafter_of,
    measure_acceptance,
)
from nextlat_dist.calibration.cycle_costs import (
    cycles_in_turn,
    first_and_further,
    increasing,
    measure_cycle_costs,
    median_costs,
)
from nextlat_dist.calibration.logistic import fit, probability, reliability
from nextlat_dist.calibration.observations import Observations
from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.drafters.latent_predictor import PREDICTOR_DIRECTORY
from nextlat_dist.inference.generation import Cycle
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration
from nextlat_dist.reporting.publish import publish
from tests.kit.exports import (
    copying_model,
    random_predictor,
    random_weights,
    tiny_config,
    write_export,
    write_tokenizer,
)
from tests.kit.form_exports import jtp_export
from tests.kit.mtp_exports import mtp_export

VOCAB_SIZE = 640  # more than the tokenizers of the prompts and of `text_dataset` have
QUICK: dict[str, Any] = {"temperatures": [0.0, 1.0], "batch_sizes": [2], "max_new_tokens": 20, "progress": False}


def make_export(directory: Path, kind: str) -> Path:
    directory.mkdir()
    write_tokenizer(directory)
    config = tiny_config(vocab_size=VOCAB_SIZE, hidden_size=64)
    weights, predictor = copying_model(config) if kind == "right" else (random_weights(config), random_predictor(64))
    return write_export(directory, config, weights, None if kind == "none" else predictor)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    texts = ["return self", "import value alpha", "beta", "gamma delta gamma delta"]
    lines = [json.dumps({"name": f"p{i}", "prompt": text}) for i, text in enumerate(texts)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "prose.jsonl").write_text("\n".join(lines[:3]) + "\n")
    return folder


@pytest.fixture
def right(tmp_path: Path) -> Path:
    return make_export(tmp_path / "right", "right")


def cycle(confidences: list[list[float]], accepted: list[int], draft: float = 0.0, seconds: float = 1.0) -> Cycle:
    return Cycle(list(range(len(accepted))), confidences, accepted, draft, seconds - draft, seconds)


def test_regression_finds_the_weights_that_the_data_were_made_with() -> None:
    generator = np.random.default_rng(0)
    truth = np.array([-0.5, 1.2, -0.7])
    features = np.concatenate([np.ones((40_000, 1)), generator.normal(size=(40_000, 2))], axis=1)
    outcomes = (generator.random(40_000) < 1 / (1 + np.exp(-features @ truth))).astype(np.float64)
    weights = fit(features, outcomes)
    np.testing.assert_allclose(weights, truth, atol=0.06)  # four standard errors
    np.testing.assert_allclose(probability(weights, features), 1 / (1 + np.exp(-features @ weights)))


@pytest.mark.parametrize("ridge", [1e-2, 5.0])
def test_regression_is_the_optimum(ridge: float) -> None:
    generator = np.random.default_rng(1)
    features = np.concatenate([np.ones((60, 1)), 3 * generator.normal(size=(60, 2))], axis=1)
    outcomes = (generator.random(60) < 0.4).astype(np.float64)

    def loss(weights: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-features @ weights))
        likelihood = np.log(np.where(outcomes == 1, p, 1 - p)).sum()
        return float(-likelihood + ridge / 2 * (weights**2).sum())

    expected = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(fit(features, outcomes, ridge), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_regression_of_outcomes_that_can_be_told_apart_stays_finite(scale: float) -> None:
    x = scale * np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    outcomes = (x > 0).astype(np.float64)
    weights = fit(np.stack([np.ones(6), x], axis=1), outcomes)
    assert np.isfinite(weights).all()
    assert weights[1] > 0
    always = fit(np.ones((50, 1)), np.ones(50))
    assert 0.99 < probability(always, np.ones((1, 1)))[0] < 1


def test_reliability_groups_of_equal_size_from_least_to_most_probable() -> None:
    predicted = np.array([0.9, 0.1, 0.8, 0.2, 0.3])
    outcomes = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    assert reliability(predicted, outcomes, 2) == [
        {"predicted": pytest.approx(0.2), "observed": pytest.approx(1 / 3), "count": 3},
        {"predicted": pytest.approx(0.85), "observed": pytest.approx(0.5), "count": 2},
    ]


def test_a_draft_counts_if_all_before_it_were_accepted() -> None:
    seen = Observations()
    seen.note(cycle([[0.9, 0.5, 0.4], [0.3], [], [0.8, 0.7]], [1, 0, 0, 2]))
    assert seen.positions == [1, 2, 1, 1, 2]
    assert seen.confidences == [0.9, 0.5, 0.3, 0.8, 0.7]
    assert seen.accepted == [True, False, False, True, True]


def test_shares_by_position_end_where_there_are_too_few_drafts() -> None:
    seen = Observations()
    for _ in range(30):
        seen.note(cycle([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], [1, 0]))
    for _ in range(10):
        seen.note(cycle([[0.5, 0.5, 0.5]], [3]))
    assert seen.acceptance(0.6).by_position == [40 / 70, 10 / 40]  # the third was reached ten times
    once = Observations()
    once.note(cycle([[0.5]], [1]))
    assert once.acceptance(1.0).by_position == [1.0]


def test_the_regression_is_the_one_that_decoding_evaluates() -> None:
    """`Acceptance.given` takes the same features in the same order as the fit."""
    generator = np.random.default_rng(2)
    truth = Acceptance(0.0, [0.5], [0.4, 0.8, -0.6])
    seen = Observations()
    for _ in range(6000):
        confidences = generator.uniform(0.02, 0.98, 5).tolist()
        outcomes = [generator.random() < truth.given(c, i) for i, c in enumerate(confidences, start=1)]
        seen.note(cycle([confidences], [(*outcomes, False).index(False)]))
    found = seen.acceptance(0.0)
    for confidence, position in [(0.1, 1), (0.5, 2), (0.95, 4)]:
        assert found.given(confidence, position) == pytest.approx(truth.given(confidence, position), abs=0.04)
    for row in seen.reliability(found):
        assert row["predicted"] == pytest.approx(row["observed"], abs=0.05)


def test_measured_shares_are_those_of_the_generations(tmp_path: Path) -> None:
    """The same decoding, counted by the engine: accepted at a position among those accepted at the one before."""
    decoder = load(make_export(tmp_path / "wrong", "random"))
    rows = [[1, 5 + row] for row in range(6)]
    observed = measure_acceptance(decoder, rows, [0.0, 1.5], 40, 3, progress=False)
    for temperature, seen in observed.items():
        generations = decoder.generate(
            rows, max_new_tokens=40, draft_length=DRAFT_LENGTH, temperature=temperature, seed=3, ignore_eos=True
        )
        drafted, accepted = seen.positions, np.array(seen.accepted)
        for position in range(1, max(drafted) + 1):
            here = np.array(drafted) == position
            assert accepted[here].sum() == sum(
                g.accepted_by_position[position - 1] for g in generations if len(g.accepted_by_position) >= position
            )
        assert drafted.count(1) == sum(g.drafted_by_position[0] for g in generations)
    assert 0 < np.mean(observed[1.5].accepted) < 1


def test_costs_that_never_fall() -> None:
    assert increasing([1.0, 3.0, 2.0, 2.5, 7.0]) == pytest.approx([1.0, 2.5, 2.5, 2.5, 7.0])
    assert increasing([4.0, 2.0, 0.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert increasing([1.0, 2.0]) == [1.0, 2.0]


def test_costs_are_medians_in_plain_steps_of_one_row() -> None:
    def part(draft: float, rest: float) -> list[Cycle]:
        return [cycle([], [], draft, draft + rest), cycle([], [], draft, draft + rest), cycle([], [], 9.0, 100.0)]

    costs = median_costs(
        {
            1: {0: part(0.0, 2.0), 2: part(1.4, 3.0), 4: part(2.4, 3.0)},
            8: {0: part(0.0, 4.0), 2: part(3.0, 10.0)},
        }
    )
    assert costs.draft == pytest.approx({1: 0.25, 8: 0.75})
    assert costs.begin == pytest.approx({1: 0.2, 8: 0.0})
    assert costs.verify == {1: pytest.approx({1: 1.0, 3: 1.5, 5: 1.5}), 8: pytest.approx({1: 2.0, 3: 5.0})}


def test_a_first_draft_step_is_never_cheaper_than_the_others() -> None:
    assert first_and_further({1: 1.0, 3: 2.0, 5: 3.0}) == pytest.approx((0.5, 0.5))
    assert first_and_further({1: 1.0, 2: 4.0}) == pytest.approx((0.0, 9 / 5))
    assert first_and_further({1: 4.0, 2: 3.0}) == pytest.approx((0.0, 10 / 5))


def test_cycles_take_turns_and_leave_the_output_alone(right: Path) -> None:
    decoder = load(right)
    rows = [[1, 5], [1, 6, 7], [1, 8]]
    by_drafts = cycles_in_turn(decoder, rows, [0, 1, 3], seed=0)
    assert list(by_drafts) == [0, 1, 3]
    for drafts, cycles in by_drafts.items():
        assert len(cycles) >= 4
        for one in cycles:
            assert [len(confidences) for confidences in one.confidences] == [drafts] * len(rows)
            assert one.accepted == [drafts] * len(rows)  # this predictor is always right
    costs = measure_cycle_costs(decoder, rows, [1, 2], seed=0, progress=False)
    assert costs.verify[1][1] == 1.0
    assert {size: list(line) for size, line in costs.verify.items()} == {1: [1, 2, 3, 5, 9], 2: [1, 2, 3, 5, 9]}
    assert min(costs.draft.values()) > 0


def test_a_drafter_of_few_tokens_is_timed_up_to_those(tmp_path: Path) -> None:
    for name, make in (("mtp", mtp_export), ("jtp", jtp_export)):
        decoder = load(make(tmp_path / name))
        costs = measure_cycle_costs(decoder, [[1, 2, 3], [2, 2]], [1, 3], seed=0, progress=False)
        assert {size: list(line) for size, line in costs.verify.items()} == {1: [1, 2, 3], 3: [1, 2, 3]}
        assert drafter_of(decoder.opened).directory == tmp_path / name / name


def test_a_calibrated_export_decodes_adaptively(right: Path, prompts: Path, tmp_path: Path) -> None:
    report = calibrate(right, [prompts], **QUICK)
    publish(report, tmp_path / "c.json", tmp_path / "pictures")
    content = report.content()
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(content))
    assert (tmp_path / "pictures" / "calibration.png").stat().st_size > 10_000
    decoder = load(right)
    calibration = decoder.calibration
    assert calibration is not None
    assert calibration.device == "cpu"
    assert list(calibration.costs.verify) == [1, 2]
    assert [entry.temperature for entry in calibration.acceptance] == [0.0, 1.0]
    assert set(calibration.acceptance[0].by_position) == {1.0}
    assert calibration.measured_on["dtype"] == "float32"
    assert calibration.measured_on["prompts"] == 7
    assert content["summary"]["accepted_share_first_temperature_0"] == 1.0
    rows = [[1, 5], [1, 6, 7]]
    adaptive = decoder.generate(rows, max_new_tokens=30, draft_length="adaptive", ignore_eos=True)
    plain = decoder.generate(rows, max_new_tokens=30, draft_length=0, ignore_eos=True)
    assert [row.token_ids for row in adaptive] == [row.token_ids for row in plain]


def test_sampled_cycles_have_costs_and_settings_of_their_own(
    right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are measured as decoding will draw: with its temperature, top-k and top-p."""
    from nextlat_dist.inference import sampling

    warped: set[tuple[float, int, float]] = set()
    probabilities = sampling.Sampling.probabilities

    def noted(self: sampling.Sampling, logits: Any) -> Any:
        warped.add((self.temperature, self.top_k, self.top_p))
        return probabilities(self, logits)

    monkeypatch.setattr(sampling.Sampling, "probabilities", noted)
    report = calibrate(right, [prompts], top_k=7, top_p=0.9, **(QUICK | {"temperatures": [0.0, 0.5, 1.0]}))
    assert warped == {(0.5, 7, 0.9), (1.0, 7, 0.9)}
    calibration = Calibration.load(right / PREDICTOR_DIRECTORY)
    assert calibration is not None
    assert [(a.temperature, a.top_k, a.top_p) for a in calibration.acceptance] == [
        (0.0, 0, 1.0),
        (0.5, 7, 0.9),
        (1.0, 7, 0.9),
    ]
    assert calibration.sampled_costs is not None
    assert calibration.costs_at(0.0) is calibration.costs
    assert calibration.costs_at(0.7) is calibration.sampled_costs
    assert list(calibration.sampled_costs.verify) == [1, 2]
    assert "sampled_draft_cost_batch_2" in report.content()["summary"]
    calibrate(right, [prompts], **(QUICK | {"temperatures": [1.0]}))
    calibration = Calibration.load(right / PREDICTOR_DIRECTORY)
    assert calibration is not None
    assert calibration.sampled_costs is None, "there are no others"


def test_measured_prompts_can_be_left_out(right: Path, prompts: Path) -> None:
    calibrate(right, [prompts], prompts_per_domain=2, skip=2, **QUICK)
    calibration = Calibration.load(right / PREDICTOR_DIRECTORY)
    assert calibration is not None
    assert calibration.measured_on["prompts"] == 2 + 1
    with pytest.raises(UserError, match=r"domain prose has 3 prompts and skip is 3.*lower --skip"):
        calibrate(right, [prompts], skip=3, **QUICK)


def test_the_draft_vocabulary_is_changed_before_measuring(right: Path, prompts: Path, text_dataset: Path) -> None:
    content = calibrate(right, [prompts], draft_vocabulary=2, data=text_dataset / "train", **QUICK).content()
    assert 0 < content["summary"]["draft_vocabulary_coverage"] < 0.5
    assert content["summary"]["accepted_share_first_temperature_0"] < 0.5  # of all ids the predictor is always right
    decoder = load(right)
    assert decoder.drafter is not None
    assert decoder.drafter.vocabulary is not None
    assert len(decoder.drafter.vocabulary) == 2
    assert decoder.calibration is not None
    calibrate(right, [prompts], draft_vocabulary=0, **QUICK)
    drafter = load(right).drafter
    assert drafter is not None
    assert drafter.vocabulary is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch-size", "0"], "batch sizes ≥ 1"),
        (["--max-new-tokens", "2"], "3 new tokens"),
        (["--skip", "-1"], "a skip ≥ 0"),
        (["--prompts-per-domain", "0"], "prompts_per_domain is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top_p is 0"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--draft-vocabulary", "100"], "name one with --data"),
        (["--draft-vocabulary", "100", "--data", "nowhere"], "nowhere"),
    ],
)
def test_a_bad_option_is_one_sentence(
    right: Path, prompts: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--export", str(right), "--prompts", str(prompts), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert not (right / PREDICTOR_DIRECTORY / "calibration.json").exists()


def test_nothing_to_calibrate(tmp_path: Path, prompts: Path) -> None:
    export = make_export(tmp_path / "plain", "none")
    with pytest.raises(UserError, match="nothing to draft with, so there is nothing to calibrate"):
        calibrate(export, [prompts], **QUICK)
    with pytest.raises(UserError, match="nothing to draft with"):
        calibrate(export, [prompts], draft_vocabulary=0, **QUICK)
