"""The price of a drafter: both grids, from numbers that are known to the page; test_ablate has a grid's own steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nextlat_dist.errors import UserError
from nextlat_dist.experiments import price
from nextlat_dist.experiments.grid import cells_of, read_grid
from nextlat_dist.reporting.report import Report

SEEDS = (0, 1)
STEPS = {"gpt": 1.0, "nextlat": 2.0, "tenth": 2.0, "shadow": 2.5, "decay": 1.6}
LOSSES = {"gpt": 5.0, "nextlat": 5.1, "tenth": 5.02, "shadow": 5.0, "decay": 5.05}


def row(variant: str, seed: int, loss: float, *evaluations: str) -> dict[str, Any]:
    accepted = {f"{name}/{price.GREEDY}": 1.0 + seed for name in evaluations}
    accepted |= {f"{name}/{price.SAMPLED}": 2.0 + seed for name in evaluations}
    step = STEPS.get(variant, 1.0)
    return {"variant": variant, "seed": seed, "seconds": 9.0, price.LOSS: loss, price.STEP: step, **accepted}


def at_equal_tokens() -> list[dict[str, Any]]:
    both = {"gpt": [price.FITTED_DRAFTS], "nextlat": [price.DRAFTS, price.FITTED_DRAFTS]}
    evaluations = {name: both.get(name, [price.DRAFTS]) for name in LOSSES}
    return [row(name, seed, LOSSES[name] + seed, *evaluations[name]) for seed in SEEDS for name in LOSSES]


def at_equal_seconds() -> list[dict[str, Any]]:
    return [row(name, seed, 5.3 + 2 * seed, way.evaluation) for seed in SEEDS for name, way in price.WAYS.items()]


def test_shares_by_hand() -> None:
    """GPT takes 100 s. A fit to its base takes 10 of them, one to NextLat's 20."""
    shares = price.shares_of(at_equal_tokens(), 100, {"gpt": 10.0, "nextlat": 20.0})
    expected = {"joint": 0.5, "joint_refit": 0.4, "tenth": 0.5, "shadow": 0.4, "decay": 0.625, "posthoc": 0.9}
    assert shares == pytest.approx(expected)
    with pytest.raises(UserError, match=r"joint_refit takes 200 s, GPT's whole training 100 s; raise"):
        price.shares_of(at_equal_tokens(), 100, {"gpt": 10.0, "nextlat": 200.0})


def test_the_second_grid_can_be_run_and_is_cut(tmp_path: Path) -> None:
    path, output = price.grid_file(), tmp_path / "out"
    cells = cells_of(read_grid(path), [0], output / price.TOKENS)
    whole = cells[0].config
    shares = dict.fromkeys(price.WAYS, 1.0) | {"decay": 0.5, "posthoc": 0.75}
    file = tmp_path / "seconds.yaml"
    file.write_text(yaml.safe_dump(price.cut_grid(read_grid(path), output, cells, shares), sort_keys=False))
    grid = read_grid(file)
    cut = {cell.variant: cell.config for cell in cells_of(grid, [0], output / price.SECONDS)}
    assert list(cut) == list(price.WAYS)
    for name, config in cut.items():
        assert config.total_steps == round(whole.total_steps * shares[name]), name
        assert config.schedule.decay_tokens == round(whole.schedule.decay_tokens * shares[name]), name
        assert config.data.train == str(output / price.TOKENS / "data" / "shards/train")
        assert config.objective.name == ("next_token" if name == "posthoc" else "nextlat")
    assert cut["decay"].objective.lambda_schedule["lambda_kl"] == [[69_500, 0], [70_000, 1]]
    assert (cut["tenth"].objective.lambda_kl, cut["shadow"].objective.detach_base) == (0.1, True)
    asked = {name: grid.variants_of(one) for name, one in grid.evaluations.items()}
    assert asked == {"drafts": ["joint", "tenth", "shadow", "decay"], "fitted-drafts": ["joint_refit", "posthoc"]}
    assert grid.variants_of(grid.exports[price.FITTED]) == ["joint_refit", "posthoc"]
    assert (grid.data, grid.then) == ([], {})


@pytest.fixture
def page() -> Report:
    tokens, seconds = (
        Report("nextlat ablate", {"grid": "g"}, {}, rows) for rows in (at_equal_tokens(), at_equal_seconds())
    )
    return price.report_of(tokens, seconds, dict.fromkeys(price.WAYS, 0.5))


def test_losses_are_over_the_twin_of_the_same_seed(page: Report) -> None:
    summary = page.summary
    found = {way: summary[f"price_loss_{way}"] for way in price.WAYS}
    expected = {"joint": 0.1, "joint_refit": 0.1, "tenth": 0.02, "shadow": 0.0, "decay": 0.05, "posthoc": 0.0}
    assert found == pytest.approx(expected)
    assert summary["price_loss_joint_low"] == pytest.approx(summary["price_loss_joint_high"]), "equal over both seeds"
    # 5.3 - 5 and 7.3 - 6: mean 0.8, deviation 0.7071, half an interval 12.706 * 0.5
    assert summary["price_seconds_loss_shadow"] == pytest.approx(0.8)
    assert summary["price_seconds_loss_shadow_high"] == pytest.approx(0.8 + 12.706 * 0.5)
    for middle in ("", "seconds_"):
        for way in price.WAYS:
            assert summary[f"price_{middle}accepted_{way}"] == 2.5
            assert summary[f"price_{middle}accepted_greedy_{way}"] == 1.5


def test_the_page_and_its_picture(page: Report) -> None:
    lines = [" ".join(line.split()) for line in page.text.splitlines()]
    assert "GPT: validation loss 5.500, 1.000 s a step" in lines
    assert "decay 2 +0.050 (+0.050 to +0.050) 2.500 ± 0.707 1.500 ± 0.707 1.600 1.00" in lines
    assert "joint 2 +0.800 (-5.553 to +7.153) 2.500 ± 0.707 1.500 ± 0.707 1.000 0.50" in lines
    figure = page.pictures[price.PICTURE]()
    assert [axis.get_title() for axis in figure.axes] == ["equal tokens", "equal seconds"]
    for axis in figure.axes:
        legend = axis.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == list(price.WAYS)
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [len(np.asarray(line.get_xdata())) for line in dots] == [len(SEEDS)] * len(price.WAYS)


def test_an_interval_by_hand() -> None:
    assert price.interval([1.0]) == (-math.inf, math.inf)
    low, high = price.interval([1.0, 2.0, 3.0])  # 2 ± 4.303 / sqrt(3)
    assert (low, high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)


def test_a_grid_that_is_not_complete_has_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ablate(config: Path, output: Path, **given: Any) -> Report:
        extra = {"failures": [{"variant": "gpt"}], "missing": {}}
        return Report("nextlat ablate", {}, {}, [], extra=extra, remarks=["failed: gpt, seed 0, at train; see log"])

    monkeypatch.setattr(price, "ablate", ablate)
    with pytest.raises(UserError, match="failed: gpt, seed 0, at train; see log; the same command resumes"):
        price.price(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_grids_at_toy_scale(tmp_path: Path) -> None:
    """The shipped grid on the quickstart's text, with a toy model and fits of two steps."""
    shipped = price.grid_file()
    raw = shipped.read_text().replace("base: ../quickstart.yaml", f"base: {shipped.parent.parent / 'quickstart.yaml'}")
    raw = raw.replace("--length, 256]", "--length, 32, --steps, 2]").replace(
        "--prompts-per-domain, 8", "--prompts-per-domain, 1"
    )
    raw = raw.replace("--max-new-tokens, 96", "--max-new-tokens, 6").replace(
        "[139_000, 0], [140_000, 1]", "[4_096, 0], [8_192, 1]"
    )
    grid = tmp_path / "price.yaml"
    grid.write_text(raw)
    toy = {
        **{"model.num_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2, "data.sequence_length": 64},
        **{"training.train_tokens": 102_400, "schedule.warmup_tokens": 512, "schedule.decay_tokens": 12_800},
        **{"training.validation_batches": 1, "training.log_interval": 5},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(price, "grid_file", lambda: grid)
        overrides = [f"{key}={value}" for key, value in toy.items()]
        report = price.price(tmp_path / "out", seeds=[0], jobs=2, overrides=overrides)
        # What is finished stays: nothing is trained again, and the page is the same.
        stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/cells/**/*.done")}
        again = price.price(tmp_path / "out", seeds=[0], jobs=2, overrides=overrides)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/cells/**/*.done")} == stamps
    assert again.summary == report.summary
    assert report.summary["price_loss_posthoc"] == report.summary["price_loss_shadow"] == 0.0, (
        "the base is GPT's, bit for bit"
    )
    assert report.summary["price_loss_joint"] == report.summary["price_loss_joint_refit"] != 0.0
    assert {f"price_{middle}accepted_{way}" for middle in ("", "seconds_") for way in price.WAYS} <= set(report.summary)
    assert (tmp_path / "out/text/nextlat-0/fitted/latent_predictor/model.safetensors").is_file()
