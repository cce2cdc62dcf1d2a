"""The speculative report on tiny exports: its structure, its counts and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.speculative.measure import by_name, evaluate_speculative
from nextlat_dist.evaluation.speculative.methods import encode_prompts
from nextlat_dist.evaluation.speculative.trials import LEAST_TRIALS, repeated_share
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import Generation
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration, Costs
from tests.kit.exports import (
    copying_model,
    random_predictor,
    random_weights,
    tiny_config,
    write_export,
    write_tokenizer,
)

OPTIONS: dict[str, Any] = {"draft_lengths": [1, 2, 3], "max_new_tokens": 17, "progress": False}
TEXTS = ["return self", "import value alpha", "beta", "gamma delta gamma delta"]


def make_export(directory: Path, right: bool) -> Path:
    """Calibrated to draft 3 tokens, whatever their confidence: costs are low, and so is the chance of a fourth."""
    directory.mkdir()
    config = tiny_config(vocab_size=write_tokenizer(directory), hidden_size=64)
    weights, predictor = copying_model(config) if right else (random_weights(config), random_predictor(64))
    write_export(directory, config, weights, predictor)
    stops = {"eos_token_id": list(range(config.vocab_size))}  # every token would stop a run that does not ignore EOS
    (directory / "generation_config.json").write_text(json.dumps(stops))
    costs = Costs({1: 0.01}, {1: {1: 1.0, 4: 1.0, 5: 9.0}})
    acceptance = Acceptance(0.0, [0.9, 0.9, 0.9], [5.0, 0.0, 0.0])
    Calibration("cpu", costs, [acceptance]).save(directory / "latent_predictor")
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    lines = [json.dumps({"name": f"p{i}", "prompt": text}) for i, text in enumerate([*TEXTS[:3], "never read"])]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "prose.txt").write_text(TEXTS[3])
    return folder


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("right") / "export", right=True)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("wrong") / "export", right=False)


def rows_by_key(content: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    names = ("model", "domain", "batch_size", "temperature", "draft_length")
    return {tuple(row[name] for name in names): row for row in content["rows"]}


def test_the_whole_report(
    right: Path, wrong: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: two batch sizes, two temperatures, a second export, Hugging Face."""
    json_path = tmp_path / "made" / "speculative.json"
    command = ["evaluate", "speculative", "--export", str(right), "--rival", str(wrong), "--prompts", str(prompts)]
    command += ["--draft-length", "0..2,adaptive", "--temperature", "0,1", "--batch-size", "1,3"]
    command += ["--max-new-tokens", "9", "--prompts-per-domain", "3", "--prompt-tokens", "4", "--hugging-face"]
    command += ["--json", str(json_path), "--pictures", str(tmp_path / "pictures")]
    assert main(command) == 0
    printed = capsys.readouterr()
    content = json.loads(json_path.read_text())
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == [
        "acceptance_by_position.png",
        "cost_split.png",
        "speedup_by_draft_length.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    rows = rows_by_key(content)
    own = {
        (model, domain, batch_size, temperature, length)
        for model in ("nextlat", "mtp")
        for domain in ("code", "prose", "all")
        for batch_size in (1, 3)
        for temperature in (0.0, 1.0)
        for length in (0, 1, 2, "adaptive")
    }
    outside = {
        ("hugging_face", domain, 1, temperature, length)
        for domain in ("code", "prose", "all")
        for temperature in (0.0, 1.0)
        for length in (0, "prompt_lookup")
    }
    assert set(rows) == own | outside
    assert rows["nextlat", "code", 1, 0.0, 2]["turns"] == rows["mtp", "prose", 3, 1.0, 0]["turns"] == LEAST_TRIALS
    assert rows["nextlat", "code", 3, 1.0, 1]["tokens"] == LEAST_TRIALS * 3 * 9
    assert rows["nextlat", "all", 1, 0.0, "adaptive"]["acceptance_by_position"] == [1.0] * 3
    assert rows["hugging_face", "code", 1, 0.0, 0]["greedy_differing"] == 0
    summary = content["summary"]
    assert summary["prompts"] == 4
    assert summary["greedy_identical"] is True
    assert summary["code_b1_t0_accepted_adaptive"] > summary["mtp_code_b1_t0_accepted_adaptive"]
    assert summary["prose_b3_t1_baseline_tokens_per_second"] > 0
    assert summary["code_b1_t1_hugging_face_prompt_lookup_over_baseline"] > 0
    assert summary["b1_verify_cost_1"] == summary["b3_verify_cost_1"] == summary["mtp_b3_verify_cost_1"] == 1.0
    assert summary["mtp_b1_draft_cost"] > 0
    assert set(content["machine"]) == {"cpu", "cores", "torch_threads", "gpus"}
    assert len(content["cycle_split"]) == 2 * 2 * 2 * 4  # models, batch sizes, temperatures, draft lengths
    for split in content["cycle_split"]:
        assert split["draft_share"] + split["verify_share"] + split["overhead_share"] == pytest.approx(1.0)
    drafting = dict.fromkeys((0, 1, 2, "adaptive"), 0.0)  # all cells together: one cycle may have to wait
    for split in content["cycle_split"]:
        drafting[split["draft_length"]] += split["draft_share"]
        assert split["draft_share"] > 0.01 or split["draft_length"] == 0
    assert drafting[0] < min(drafting[1], drafting[2])
    text = json_path.read_text()
    assert str(tmp_path) not in text
    assert str(right) not in text
    assert len(printed.out.split("nextlat, batch 1")[0].splitlines()) == 2 * (2 + 3 * 2 * 2)  # two tables of the cells
    for expected in ("flatter", "v(3) =", "NextLat writes more", "with prompt lookup", *content["verdicts"]):
        assert expected in printed.out
    trials = 2 * 2 * 2 * LEAST_TRIALS  # domains, batch sizes, temperatures
    assert f"evaluate speculative: {trials}/{trials}" in printed.err


def test_a_right_drafter_fills_every_cycle(right: Path, prompts: Path) -> None:
    content = evaluate_speculative(
        right, [prompts], prompts_per_domain=3, repeats=2, temperatures=[0.0], **OPTIONS
    ).content()
    rows = rows_by_key(content)
    assert set(rows) == {("nextlat", d, 1, 0.0, k) for d in ("code", "prose", "all") for k in (0, 1, 2, 3)}
    # 17 tokens: one of the prefill, then blocks of at most draft length + 1.
    for length in (0, 1, 2, 3):
        row = rows["nextlat", "all", 1, 0.0, length]
        cycles = -(-16 // (length + 1))
        assert row["turns"] == 2 * 2 * LEAST_TRIALS
        assert row["cycles"] == 4 * LEAST_TRIALS * cycles
        assert row["accepted_tokens_per_cycle"] == pytest.approx((16 - cycles) / cycles)
        assert row["tokens_per_cycle"] == pytest.approx(16 / cycles)
        assert row["acceptance_by_position"] == [1.0] * length
        assert row["greedy_differing"] == 0
    assert not [name for name in content["summary"] if "adaptive" in name]


def test_a_wrong_drafter_accepts_little_and_changes_nothing(wrong: Path, prompts: Path) -> None:
    content = evaluate_speculative(wrong, [prompts], prompts_per_domain=4, temperatures=[0.0], **OPTIONS).content()
    assert content["summary"]["greedy_identical"] is True
    row = rows_by_key(content)["nextlat", "code", 1, 0.0, 3]
    texts = [*TEXTS[:3], "never read", *TEXTS[:2]]  # the first two once more, for LEAST_TRIALS
    results = load(wrong).generate(texts, max_new_tokens=17, draft_length=3, ignore_eos=True)
    assert row["accepted_tokens_per_cycle"] < 0.5
    assert row["accepted_tokens_per_cycle"] == pytest.approx(
        sum(r.accepted for r in results) / sum(r.cycles for r in results)
    )
    assert row["repeated_4gram_share"] == pytest.approx(np.mean([repeated_share(r.token_ids) for r in results]))


def test_greedy_output_that_differs_is_reported(right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One continuation of draft length 2 is falsified without the decoder knowing, after the trial that warms up."""
    original, seen = Decoder.generate, []

    def falsify(self: Decoder, given: list[list[int]], **options: Any) -> list[Generation]:
        results = original(self, given, **options)
        seen.append(options["draft_length"])
        if options["draft_length"] == 2 and seen.count(2) == 2:
            results[0].token_ids[5] = (results[0].token_ids[5] + 1) % 300
        return results

    monkeypatch.setattr(Decoder, "generate", falsify)
    report = evaluate_speculative(right, [prompts], prompts_per_domain=2, temperatures=[0.0], **OPTIONS)
    content = report.content()
    assert content["summary"]["greedy_identical"] is False
    assert content["summary"]["greedy_differences"] == 1
    (difference,) = content["greedy_differences"]
    assert (difference["domain"], difference["prompt"], difference["batch_size"]) == ("code", "p0", 1)
    assert (difference["draft_length"], difference["position"]) == (2, 5)
    assert difference["logit_gap"] == content["summary"]["greedy_largest_logit_gap"] > 0
    rows = rows_by_key(content)
    assert [rows["nextlat", "all", 1, 0.0, k]["greedy_differing"] for k in (0, 1, 2, 3)] == [0, 0, 1, 0]
    assert "1 greedy continuations differ" in report.text


def test_speed_is_read_off_the_timings(right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up timings every ratio is known: a cycle takes one second, or two for the longer prompts."""
    original = Decoder.generate

    def timed(self: Decoder, given: list[list[int]], **options: Any) -> list[Generation]:
        results = original(self, given, **options)
        for ids, result in zip(given, results, strict=True):
            result.decode_seconds = result.cycles * (1.0 + (len(ids) > 4))
            result.prefill_seconds = 1.0
        return results

    monkeypatch.setattr(Decoder, "generate", timed)
    content = evaluate_speculative(
        right,
        [prompts],
        prompts_per_domain=3,
        temperatures=[0.0],
        batch_sizes=[3, 1],
        **{**OPTIONS, "draft_lengths": None},
    ).content()
    rows, summary = rows_by_key(content), content["summary"]
    assert {key[4] for key in rows} == {*range(11), "adaptive"}
    row = rows["nextlat", "code", 1, 0.0, 3]
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == pytest.approx(4.0)
    assert (row["tokens_per_second_low"], row["tokens_per_second_high"]) == (16 / 8, 16 / 4)
    assert rows["nextlat", "code", 3, 0.0, 3]["tokens_per_second"] == pytest.approx(3 * 16 / (4 * 2))
    # 16 tokens in two cycles: the shortest draft length that does it is taken, though longer ones are as fast.
    assert summary["all_b1_t0_draft_length_fixed_best"] == 7
    assert summary["all_b1_t0_speedup_fixed_best"] == pytest.approx(8.0)
    assert summary["all_b1_t0_speedup_adaptive"] == pytest.approx(4.0)
    assert summary["all_b1_t0_adaptive_over_fixed_best"] == pytest.approx(0.5)
    assert summary["adaptive_keeps_up"] is False
    assert summary["adaptive_never_slower"] is True


def test_named_exports(right: Path, wrong: Path, prompts: Path) -> None:
    """Three of them: names of the first are plain, those of the others begin with theirs."""
    options = OPTIONS | {"draft_lengths": [1, 3], "max_new_tokens": 9}
    exports = [f"good={right}", f"bad={wrong}", f"mtp={right}"]
    report = evaluate_speculative(exports, [prompts], prompts_per_domain=1, temperatures=[1.0], **options)
    content, summary = report.content(), report.summary
    assert content["models"] == ["good", "bad", "mtp"]
    assert {row["model"] for row in content["rows"]} == {"good", "bad", "mtp"}
    assert summary["code_b1_t1_accepted_fixed_best"] == summary["mtp_code_b1_t1_accepted_fixed_best"]
    assert summary["code_b1_t1_accepted_fixed_best"] > summary["bad_code_b1_t1_accepted_fixed_best"]
    assert summary["code_b1_t1_good_over_bad"] > 0
    assert {"good_ahead_of_bad", "good_ahead_of_mtp", "bad_b1_draft_cost"} <= set(summary)
    assert not [name for name in summary if "nextlat" in name or "over_good" in name]
    assert "bad best fixed" in report.text
    assert "good writes more tokens per second than MTP" in report.text
    assert set(report.pictures) == {"speedup_by_draft_length.png", "acceptance_by_position.png", "cost_split.png"}
    labels = [text.get_text() for text in report.pictures["speedup_by_draft_length.png"]().axes[0].get_legend().texts]
    assert labels == ["code", "prose", "all", "bad, all", "MTP, all"]


def test_the_export_without_a_name_is_the_main_one() -> None:
    assert by_name(["runs/a/export"]) == {"nextlat": Path("runs/a/export")}
    assert by_name(["runs/a/export", "mtp=b"]) == {"nextlat": Path("runs/a/export"), "mtp": Path("b")}
    assert list(by_name(["a=x", "runs/b/export"])) == ["a", "b"]
    for texts in (["a=x", "a=y"], ["x", "nextlat=y"]):
        with pytest.raises(UserError, match="two exports are called"):
            by_name(texts)
    with pytest.raises(UserError, match="as other numbers of the report are"):
        by_name(["x", "hugging_face=y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "at least 1 repeat"),
        ({"max_new_tokens": 1}, "2 new tokens"),
        ({"temperatures": []}, "1 temperature"),
        ({"temperatures": [-1.0]}, "change temperature"),
        ({"draft_lengths": [-2]}, "change draft_length"),
        ({"draft_lengths": [0]}, "0 alone"),
        ({"batch_sizes": [4, 0]}, "change batch_size"),
        ({"prompt_tokens": 1}, "change prompt_tokens"),
        ({"max_new_tokens": 125}, "exceeds the model's context of 128"),
    ],
)
def test_bad_requests(right: Path, prompts: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_speculative(right, [prompts], **{**OPTIONS, **options})


def test_prompts_are_cut_after_their_first_tokens(right: Path, prompts: Path) -> None:
    decoder = load(right)
    cut = encode_prompts({"nextlat": decoder}, [prompts], per_domain=3, prompt_tokens=4, max_new_tokens=124)
    whole = [decoder.encode(text) for text in TEXTS]
    assert [prompt.ids for domain in ("code", "prose") for prompt in cut[domain]] == [ids[:4] for ids in whole]
    assert max(map(len, whole)) > 4


def test_an_export_that_cannot_do_it(tmp_path: Path, right: Path, prompts: Path) -> None:
    config = tiny_config(vocab_size=write_tokenizer(tmp_path))
    write_export(tmp_path, config, random_weights(config), None)
    with pytest.raises(UserError, match="has nothing to draft with"):
        evaluate_speculative(tmp_path, [prompts], **OPTIONS)
    write_export(tmp_path, config, random_weights(config), random_predictor(config.hidden_size))
    with pytest.raises(UserError, match="is not calibrated"):
        evaluate_speculative(tmp_path, [prompts], draft_lengths=["adaptive"])


def test_exports_of_different_tokenizers(
    tmp_path: Path, right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Decoder.encode
    rival = make_export(tmp_path / "rival", right=False)

    def encode(self: Decoder, prompt: str) -> list[int]:
        return [*original(self, prompt), *([5] if self.export == rival else [])]

    monkeypatch.setattr(Decoder, "encode", encode)
    with pytest.raises(UserError, match="in other tokens"):
        evaluate_speculative(right, [prompts], rival=rival, **OPTIONS)


def test_another_export_gets_the_lengths_that_it_can_draft(
    right: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextlat_dist.evaluation.speculative import measure as speculative

    def loaded(export: Path) -> Decoder:
        decoder = load(export)
        if export.name == "rival":
            assert decoder.drafter is not None
            decoder.drafter.longest = 2
            decoder.calibration = None
        return decoder

    monkeypatch.setattr(speculative, "load", loaded)
    rival = right.with_name("rival")
    if not rival.exists():
        rival.symlink_to(right)
    options = OPTIONS | {"draft_lengths": [1, 2, 3, "adaptive"]}
    content = evaluate_speculative(right, [prompts], rival=rival, temperatures=[1.0], **options).content()
    assert {row["draft_length"] for row in content["rows"] if row["model"] == "nextlat"} == {0, 1, 2, 3, "adaptive"}
    assert {row["draft_length"] for row in content["rows"] if row["model"] == "mtp"} == {0, 1, 2}
    (costs,) = (entry for entry in content["costs"] if entry["model"] == "mtp")
    assert set(costs["verify"]) == {"1", "2", "3"}
