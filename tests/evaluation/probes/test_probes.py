"""Linear probes: states whose information about the future is known, and the command from exports to JSON."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.effective_rank import effective_rank, effective_rank_of_logits
from nextlat_dist.evaluation.probes import command as probes_command
from nextlat_dist.evaluation.probes import measure as probes_measure
from nextlat_dist.evaluation.probes.linear_probes import (
    Fitting,
    Sequences,
    difference,
    log_frequencies,
    no_state_losses,
    pair_counts,
    probe_losses,
    read_sequences,
)
from nextlat_dist.evaluation.probes.measure import evaluate_probes
from nextlat_dist.huggingface.base import load_base_weights
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.reporting.publish import publish
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export

IDS = 4


def drawn(documents: int = 60, length: int = 40, seed: int = 0) -> Sequences:
    """Ragged documents of even, independent draws of four ids; after their ends stands id 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, IDS, (documents, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (documents,), generator=generator)
    sequences = Sequences(tokens, lengths)
    return Sequences(torch.where(sequences.real(), tokens, 0), lengths)


def ahead(sequences: Sequences, steps: int) -> torch.Tensor:
    """x_{t + steps} at position t, 0 where there is none."""
    return functional.pad(sequences.tokens[:, steps:], (0, steps))


def loss(states: torch.Tensor, sequences: Sequences, offset: int) -> float:
    nats = probe_losses(states, sequences, offset, IDS, Fitting(steps=150, batch=256))
    return float(nats.sum() / pair_counts(sequences, offset).sum())


def test_a_state_that_shows_the_token_two_ahead_shows_that_one_only() -> None:
    sequences = drawn()
    states = functional.one_hot(ahead(sequences, 2), IDS).float()
    assert loss(states, sequences, 2) < 0.02
    for other in (1, 3):
        assert loss(states, sequences, other) == pytest.approx(math.log(IDS), abs=0.04)


def test_half_of_what_is_to_come_costs_one_bit() -> None:
    """The state tells x_{t+1} up to its last bit, at any scale and offset."""
    sequences = drawn()
    states = 100 + 7 * functional.one_hot(ahead(sequences, 1) // 2, 2).float()
    assert loss(states, sequences, 1) == pytest.approx(math.log(2), abs=0.03)


def test_documents_that_are_judged_are_not_fitted() -> None:
    """Between those that are fitted, the state shows another token than the one that comes."""
    sequences = drawn()
    shown = ahead(sequences, 1) + (torch.arange(len(sequences.tokens)) % 2)[:, None]
    assert loss(functional.one_hot(shown % IDS, IDS).float(), sequences, 1) > 3


def test_losses_of_the_frequencies_by_hand() -> None:
    """Documents 0 and 2 are fitted: 2, 2, 2, 1 follow something; one more each gives shares 1/8, 2/8, 4/8, 1/8."""
    tokens = torch.tensor([[0, 2, 2], [3, 1, 0], [0, 2, 1], [1, 2, 3]])
    sequences = Sequences(tokens, torch.tensor([3, 2, 3, 3]))
    assert torch.allclose(log_frequencies(torch.tensor([2, 2, 2, 1]), IDS).exp(), torch.tensor([1, 2, 4, 1]) / 8)
    by_hand = torch.tensor([math.log(8 / 2), math.log(8 / 4) + math.log(8 / 1)], dtype=torch.float64)
    assert torch.allclose(no_state_losses(sequences, 1, IDS), by_hand)
    assert pair_counts(sequences, 1).tolist() == [1, 2]
    assert pair_counts(sequences, 2).tolist() == [0, 1]
    assert sequences.pairs(2, judged=True).tolist() == [[3, 0]]
    assert sequences.pairs(1, judged=False).tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]


def test_difference_and_its_error_by_hand() -> None:
    """(1 + 3) / (3 + 1) = 1 apart; residuals 1 - 3 and 3 - 1, so sqrt((4 + 4) · 2 / 1) / 4 = 1."""
    nats, baseline, counts = torch.tensor([5.0, 8.0]), torch.tensor([4.0, 5.0]), torch.tensor([3, 1])
    assert difference(nats, baseline, counts) == pytest.approx((1.0, 1.0))
    assert difference(nats, nats, counts) == (0.0, 0.0)


def make_export(directory: Path, seed: int, predictor: bool, vocab_size: int = 600) -> Path:
    config = tiny_config(vocab_size=vocab_size)
    return write_export(
        directory, config, random_weights(config, seed), random_predictor(config.hidden_size) if predictor else None
    )


def test_from_exports_to_json_and_picture(
    text_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt = make_export(tmp_path / "gpt", 0, predictor=False)
    other = [make_export(tmp_path / f"other{seed}", seed, predictor=True) for seed in (1, 2)]
    data, target = text_dataset / "train", tmp_path / "probes.json"
    given = [f"gpt={gpt}", *(f"other={export}" for export in other)]
    options: dict[str, Any] = {"offsets": (1, 3), "sequences": 12, "length": 24, "progress": False}
    fitting = Fitting(steps=4, batch=32)
    report = evaluate_probes(given, data, **options, fitting=fitting)
    publish(report, target, tmp_path / "pictures")
    content = json.loads(target.read_text())
    assert content == report.content()
    assert (tmp_path / "pictures" / "probes_by_offset.png").stat().st_size > 1000
    sequences = read_sequences(data, 12, 24)
    counts = pair_counts(sequences, 3)

    def nats(export: Path) -> torch.Tensor:
        return probe_losses(ExportModel(export).states(sequences.tokens).clone(), sequences, 3, 600, fitting)

    of_gpt, of_other = nats(gpt), (nats(other[0]) + nats(other[1])) / 2
    summary = content["summary"]
    assert summary["gpt_loss_3"] == pytest.approx(float(of_gpt.sum() / counts.sum()))
    assert summary["other_difference_3"] == pytest.approx(difference(of_other, of_gpt, counts)[0])
    assert "gpt_difference_3" not in summary
    states = ExportModel(gpt).states(sequences.tokens)[sequences.real()]
    assert summary["gpt_effective_rank"] == pytest.approx(effective_rank(states))
    assert summary["effective_rank_states"] == len(states)
    head = load_base_weights(gpt)["lm_head.weight"]
    assert summary["gpt_effective_rank_logits"] == pytest.approx(effective_rank_of_logits(states, head))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["offset", "gpt", "other", "other", "-", "gpt", "no", "state"]
    assert f"effective rank of {len(states):,} states (12 sequences; the paper: 256 of 256)" in printed

    with pytest.raises(UserError, match=r"--baseline is 'none', but the exports are called gpt, other"):
        evaluate_probes(given, data, baseline="none", **options)
    with pytest.raises(UserError, match=r"no pair of tokens 24 apart is in the first 24 tokens"):
        evaluate_probes(given, data, **{**options, "offsets": (24,)})
    with pytest.raises(UserError, match=r"--offsets are \[0, 1\], --sequences 12 and --steps 300, but"):
        evaluate_probes(given, data, **{**options, "offsets": (0, 1)})
    small = make_export(tmp_path / "small", 0, predictor=False, vocab_size=31)
    with pytest.raises(UserError, match=r"small knows 31 token ids, but .* has 600; give data of its tokenizer"):
        evaluate_probes([str(small)], data, **options)


def test_sequences_are_the_beginnings_of_documents(text_dataset: Path) -> None:
    few, many = read_sequences(text_dataset / "train", 5, 10), read_sequences(text_dataset / "train", 10_000, 10_000)
    assert few.tokens.shape == (5, 10)
    assert few.lengths.tolist() == [10] * 5
    assert torch.equal(few.tokens, many.tokens[:5, :10])
    assert set(few.tokens[:, 0].tolist()) == {1}  # BOS
    assert len(set(many.lengths.tolist())) > 3
    assert not many.tokens[~many.real()].any()


def test_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    probes_command.add_command(parser.add_subparsers())
    asked: list[Any] = []
    published: list[Any] = []
    monkeypatch.setattr(probes_measure, "evaluate_probes", lambda *given, **named: asked.append((given, named)))
    monkeypatch.setattr("nextlat_dist.reporting.publish.publish", lambda *given: published.append(given))
    options = parser.parse_args(
        [
            "probes",
            "--export",
            "a=x",
            "y",
            "--data",
            "d",
            "--offsets",
            "1..3,8",
            "--steps",
            "5",
            "--seed",
            "2",
            "--json",
            "out.json",
        ]
    )
    options.run_command(options)
    ((given, named),) = asked
    assert given == (["a=x", "y"], Path("d"))
    assert named["offsets"] == [1, 2, 3, 8]
    assert named["fitting"] == Fitting(steps=5, batch=512, seed=2)
    assert published == [(None, Path("out.json"), None)]
    assert (named["sequences"], named["length"], named["baseline"]) == (1024, 256, None)
