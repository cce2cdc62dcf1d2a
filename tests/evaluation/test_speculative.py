"""The speculative report on tiny exports: its structure, its counts and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation import speculative
from nextlat_dist.evaluation.speculative import evaluate_speculative, first_difference, repeated_share
from nextlat_dist.inference.decoder import Decoder, Generation, load
from tests.inference.exports import (
    copying_model,
    random_predictor,
    random_weights,
    tiny_config,
    write_export,
    write_tokenizer,
)

OPTIONS: dict[str, Any] = {"draft_lengths": [1, 2], "report_draft_length": 3, "max_new_tokens": 17, "progress": False}


def make_export(directory: Path, right: bool) -> Path:
    directory.mkdir()
    config = tiny_config(vocab_size=write_tokenizer(directory), hidden_size=64)
    weights, predictor = copying_model(config) if right else (random_weights(config), random_predictor(64))
    write_export(directory, config, weights, predictor)
    stops = {"eos_token_id": list(range(config.vocab_size))}  # every token would stop a run that does not ignore EOS
    (directory / "generation_config.json").write_text(json.dumps(stops))
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    texts = ["return self", "import value alpha", "beta", "never read"]
    lines = [json.dumps({"name": f"p{i}", "prompt": text}) for i, text in enumerate(texts)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "prose.txt").write_text("gamma delta gamma delta")
    return folder


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("right") / "export", right=True)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("wrong") / "export", right=False)


def rows_by_key(content: dict[str, Any]) -> dict[tuple[str, float, int], dict[str, Any]]:
    return {(row["domain"], row["temperature"], row["draft_length"]): row for row in content["rows"]}


def test_a_right_predictor_is_reported_as_such(
    right: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path = tmp_path / "made" / "speculative.json"
    content = evaluate_speculative(
        right,
        [prompts],
        prompts_per_domain=3,
        repeats=2,
        json_path=json_path,
        picture_dir=tmp_path / "pictures",
        **OPTIONS,
    )
    assert json.loads(json_path.read_text()) == json.loads(json.dumps(content))
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "acceptance_by_position.png",
        "speedup_by_draft_length.png",
    }
    summary, rows = content["summary"], rows_by_key(content)
    assert set(rows) == {(d, t, k) for d in ("code", "prose", "all") for t in (0.0, 1.0) for k in (0, 1, 2, 3)}
    assert summary["prompts"] == 4
    assert rows["code", 0.0, 3]["generations"] == 3 * 2
    assert rows["all", 0.0, 3]["generations"] == 4 * 2
    assert rows["all", 1.0, 2]["tokens"] == 4 * 2 * 17
    assert summary["greedy_identical"] is True
    assert summary["draft_length"] == 3
    # 17 tokens: one of the prefill, then blocks of at most draft length + 1; a right predictor fills all of them.
    for length in (0, 1, 2, 3):
        row = rows["all", 0.0, length]
        cycles = -(-16 // (length + 1))
        assert row["cycles"] == 4 * 2 * cycles
        assert row["accepted_tokens_per_cycle"] == pytest.approx((16 - cycles) / cycles)
        assert row["tokens_per_cycle"] == pytest.approx(16 / cycles)
        assert row["acceptance_by_position"] == [1.0] * length
        assert row["greedy_differing"] == 0
    assert rows["all", 1.0, 3]["greedy_differing"] is None
    assert summary["accepted_tokens_per_cycle"] == pytest.approx(3.0)
    assert summary["sampled_accepted_tokens_per_cycle"] == rows["all", 1.0, 3]["accepted_tokens_per_cycle"]
    assert summary["code_speedup"] == rows["code", 0.0, 3]["speedup"]
    assert rows["prose", 1.0, 0]["speedup"] == 1.0
    assert summary["verify_cost_1"] == 1.0
    assert all(isinstance(value, (int, float)) for value in summary.values())
    text = json.dumps(content)
    assert str(tmp_path) not in text
    assert str(right) not in text
    assert set(content["machine"]) == {"cpu", "cores", "torch_threads", "gpus"}
    printed = capsys.readouterr().out
    assert "flatter" in printed
    assert "v(4) =" in printed


def test_a_wrong_predictor_accepts_little_and_changes_nothing(wrong: Path, prompts: Path) -> None:
    content = evaluate_speculative(wrong, [prompts], prompts_per_domain=2, temperatures=[0.0], **OPTIONS)
    assert content["summary"]["greedy_identical"] is True
    assert content["summary"]["accepted_tokens_per_cycle"] < 0.5
    assert "sampled_accepted_tokens_per_cycle" not in content["summary"]
    row = rows_by_key(content)["all", 0.0, 3]
    decoder = load(wrong)
    texts = ["return self", "import value alpha", "gamma delta gamma delta"]
    results = decoder.generate(texts, max_new_tokens=17, draft_length=3, ignore_eos=True)
    assert row["accepted_tokens_per_cycle"] == pytest.approx(
        sum(r.accepted for r in results) / sum(r.cycles for r in results)
    )
    assert row["repeated_4gram_share"] == pytest.approx(np.mean([repeated_share(r.token_ids) for r in results]))


def test_greedy_output_that_differs_is_reported(
    right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One continuation of draft length 2 is falsified behind the decoder's back."""
    original, spoiled = Decoder.generate, []

    def falsify(self: Decoder, given: list[list[int]], **options: Any) -> list[Generation]:
        results = original(self, given, **options)
        if options["draft_length"] == 2 and options["max_new_tokens"] == 17 and not spoiled:
            results[0].token_ids[5] = (results[0].token_ids[5] + 1) % 300
            spoiled.append(results[0])
        return results

    monkeypatch.setattr(Decoder, "generate", falsify)
    content = evaluate_speculative(right, [prompts], prompts_per_domain=2, **OPTIONS)
    assert content["summary"]["greedy_identical"] is False
    assert content["summary"]["greedy_differences"] == 1
    (difference,) = content["greedy_differences"]
    assert (difference["domain"], difference["prompt"]) == ("code", "p0")
    assert (difference["draft_length"], difference["position"]) == (2, 5)
    assert difference["logit_gap"] == content["summary"]["greedy_largest_logit_gap"] > 0
    rows = rows_by_key(content)
    assert [rows["all", 0.0, length]["greedy_differing"] for length in (0, 1, 2, 3)] == [0, 0, 1, 0]
    assert rows["prose", 0.0, 2]["greedy_differing"] == 0


def test_first_difference_gives_the_base_models_gap(right: Path) -> None:
    decoder = load(right, "cpu", torch.float64)
    prompt = decoder.encode("alpha beta")
    truth = decoder.generate([prompt], max_new_tokens=6, draft_length=0, ignore_eos=True)[0].token_ids
    other = [*truth[:4], truth[4] + 1, 0]
    found = first_difference(decoder, prompt, truth, other)
    ids = torch.tensor([[*prompt, *truth[:4]]])
    logits = decoder.llama.logits(decoder.llama.forward(ids, decoder.llama.new_cache(1, ids.shape[1]))[0])[-1]
    assert found["position"] == 4
    assert found["logit_gap"] == pytest.approx(float(logits[truth[4]] - logits[truth[4] + 1]), abs=1e-12)


def test_speed_is_read_off_the_timings(right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up timings every ratio is known: prompt i takes (i + 1) seconds per cycle, the prefill one second."""
    original = Decoder.generate
    order: dict[tuple[int, ...], int] = {}

    def timed(self: Decoder, given: list[list[int]], **options: Any) -> list[Generation]:
        results = original(self, given, **options)
        place = order.setdefault(tuple(given[0]), len(order))
        results[0].decode_seconds, results[0].prefill_seconds = results[0].cycles * (place + 1.0), 1.0
        return results

    monkeypatch.setattr(Decoder, "generate", timed)
    rows = rows_by_key(evaluate_speculative(right, [prompts], prompts_per_domain=3, temperatures=[0.0], **OPTIONS))
    row = rows["code", 0.0, 3]
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == pytest.approx(4.0)
    assert row["tokens_per_second"] == pytest.approx(16 / (4 * 2))  # the median prompt: 4 cycles of 2 seconds
    assert row["speedup_with_prefill"] == pytest.approx((16 * 2 + 1) / (4 * 2 + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "at least 1 repeat"),
        ({"max_new_tokens": 1}, "2 new tokens"),
        ({"temperatures": []}, "1 temperature"),
        ({"temperatures": [-1.0]}, "change temperature"),
        ({"draft_lengths": [-2]}, "change draft_lengths"),
        ({"max_new_tokens": 125}, "exceeds the model's context of 128"),
    ],
)
def test_bad_requests(right: Path, prompts: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_speculative(right, [prompts], **{**OPTIONS, **options})


def test_an_export_without_predictor(tmp_path: Path, prompts: Path) -> None:
    config = tiny_config(vocab_size=write_tokenizer(tmp_path))
    write_export(tmp_path, config, random_weights(config), None)
    with pytest.raises(UserError, match="has no latent predictor"):
        evaluate_speculative(tmp_path, [prompts], **OPTIONS)


def test_repeated_share() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(list(range(50))) == 0
    assert repeated_share([7] * 13) == pytest.approx(9 / 10)
    assert speculative.REPETITION_ORDER == 4
