"""Bases that are more than a Llama, from training to what reads them: export, decoder, transformers, the tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.measure import evaluate_task
from nextlat_dist.huggingface.forms.catalogue import FORMS
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.inference import load
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import vocab_size
from nextlat_dist.tasks.path_star import PathStar
from tests.kit.exports import prompt_of, reference_model
from tests.kit.form_exports import bst_export, jtp_export
from tests.kit.harness import Ranks
from tests.kit.task_exports import write_test_set
from tests.kit.training.runs import run_training, training_config

MAKE: dict[str, Callable[..., Path]] = {"jtp": jtp_export, "bst": bst_export}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "jtp": {"name": "jtp", "horizon": 2},
    "bst": {"name": "bst", "pair_rate": 0.5},
}


@pytest.fixture(scope="module")
def trained(one_rank: Ranks, text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exports of six steps, written by the command."""
    exports = {}
    for name, objective in OBJECTIVES.items():
        output = tmp_path_factory.mktemp(name)
        raw = training_config(output, text_dataset, {"zero_stage": 1}, {})
        one_rank.run(run_training, {**raw, "objective": objective})
        command = [sys.executable, "-m", "nextlat_dist.cli", "export", "--checkpoint", str(output / "checkpoints")]
        subprocess.run([*command, "--output", str(output / "export")], check=True, capture_output=True, timeout=120)
        exports[name] = output / "export"
    return exports


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_export_says_what_training_computes(name: str, trained: dict[str, Path]) -> None:
    report = json.loads((trained[name] / "export_report.json").read_text())
    assert report["max_logit_difference"] <= 1e-4
    opened = open_export(trained[name])
    assert opened.config.model_type == f"nextlat_{name}"
    assert (opened.drafter is not None) is (name == "jtp")
    metrics = (trained[name].parent / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in metrics]
    terms = {"jtp": {"validation_jtp"}, "bst": {"validation_previous", "validation_decoded"}}[name]
    assert any(terms <= line.keys() for line in logged)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stock_transformers_names_the_import(name: str, trained: dict[str, Path]) -> None:
    """In a process of its own, which has not imported it; with the import the model loads and generates."""
    load_it = f"from transformers import AutoModelForCausalLM as A; m = A.from_pretrained({str(trained[name])!r})"
    failed = subprocess.run([sys.executable, "-c", load_it], capture_output=True, text=True, check=False, input="")
    assert failed.returncode != 0
    assert f"import nextlat_dist.integrations.{name}" in failed.stderr.splitlines()[-2] + failed.stderr.splitlines()[-1]
    program = (
        f"import torch, nextlat_dist.integrations.{name}; {load_it}; print(m.generate(torch.tensor([[1, 5]])).tolist())"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("[[1, 5, ")
    assert "newly initialized" not in loaded.stderr


@pytest.mark.parametrize("name", MAKE)
def test_the_decoder_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    export = MAKE[name](tmp_path)
    tokens = torch.tensor([prompt_of(24), prompt_of(24, seed=1)])
    model = reference_model(export, torch.float64)
    with torch.no_grad():
        expected = model(tokens).logits
    state_model = ExportModel(export, "cpu", torch.float64)
    states = state_model.states(tokens)
    assert states.shape == (2, 24, state_model.hidden_size)
    torch.testing.assert_close(state_model.logits(states), expected)
    ids = model.generate(tokens[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    (ours,) = load(export, "cpu", torch.float64).generate(
        [tokens[0].tolist()], max_new_tokens=12, draft_length=0, ignore_eos=True
    )
    assert ours.token_ids == ids[0, 24:].tolist()


@pytest.mark.parametrize("name", MAKE)
def test_static_shapes_give_the_same(name: str, tmp_path: Path) -> None:
    from nextlat_dist.config.entries import resolve

    opened = open_export(MAKE[name](tmp_path))
    form = FORMS[opened.config.model_type]
    static = resolve(form.static_engine)(opened.config, opened.weights, "cpu", torch.float64, capture=False)
    plain = resolve(form.engine)(opened.config, opened.weights, "cpu", torch.float64)
    found = []
    for llama in (plain, static):
        cache = llama.new_cache(2, 40)
        states = [llama.forward(torch.tensor(prompt_of(9 + 5)), [9, 5], cache)]
        states.append(llama.forward(torch.tensor(prompt_of(4, seed=3)), [3, 1], cache))
        found.append(llama.logits(torch.cat(states)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", MAKE)
def test_a_task_is_evaluated(name: str, tmp_path: Path) -> None:
    star = PathStar(arms=2, length=4, nodes=20)
    export = MAKE[name](tmp_path / name, vocab_size=vocab_size(star), max_position_embeddings=24)
    summary = evaluate_task([f"{name}={export}"], write_test_set(tmp_path / "data", star, 12), progress=False).summary
    assert 0 <= summary[f"{name}_exact_greedy"] <= 1


@pytest.mark.parametrize("name", MAKE)
def test_a_base_without_its_own_weights_is_refused(name: str, tmp_path: Path) -> None:
    from nextlat_dist.huggingface.base import load_base_weights, save_base_weights

    export = MAKE[name](tmp_path)
    weights = load_base_weights(export)
    own = next(tensor for tensor in sorted(weights) if tensor.startswith(("fetch.", "text_head.")))
    del weights[own]
    save_base_weights(export, weights)
    with pytest.raises(UserError, match=own.replace(".", r"\.")):
        load(export)


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    export = jtp_export(tmp_path)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "model_type": "nextlat_other"}))
    with pytest.raises(UserError, match="has model_type 'nextlat_other'"):
        open_export(export)
    with pytest.raises(ValueError, match="nextlat_other"):
        AutoModelForCausalLM.from_pretrained(export)
