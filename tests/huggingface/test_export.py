"""An export is the trained model: byte-equal across layouts, equal logits in transformers, a tokenizer that matches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import jobs
from tests.kit.completion_server import check_root
from tests.kit.harness import Ranks
from tests.kit.training.runs import run_training, training_config

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}


def save_given_weights(raw: dict[str, Any], root: str) -> None:
    """Commit a checkpoint whose weights are noise seeded by name: the same model under every layout."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.sharding import shard, sharding_of
    from nextlat_dist.training.engine.build import build_engine
    from nextlat_dist.training.engine.master_state import local_fragments
    from nextlat_dist.training.state.saving import Saver
    from nextlat_dist.training.state.trainer_state import TrainerState

    config, dims = jobs.set_up(raw)
    engine = build_engine(config, dims)
    masters = {fragment.name: fragment for fragment in local_fragments(engine)}
    for name, parameter in canonical_parameters(engine.module):
        sharding = sharding_of(name)
        shape = list(parameter.shape)
        if sharding.dim is not None:
            shape[sharding.dim] *= dims.tensor_size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + 7 * sum(map(ord, name))))
        local = shard(0.2 * noise, sharding, dims.tensor_rank, dims.tensor_size)
        with torch.no_grad():
            parameter.copy_(local)
        if name in masters:
            master = masters[name].values["weight"]
            master.copy_(local.flatten()[masters[name].start :][: master.numel()])
    saver = Saver(config, dims, engine, Path(root), None)
    saver.save(TrainerState(step=1))
    assert [outcome.error for outcome in saver.finish()] == [""]


def export(checkpoint: Path, output: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "nextlat_dist.cli", "export", "--checkpoint", str(checkpoint)]
    subprocess.run([*command, "--output", str(output), *options], check=True, capture_output=True, timeout=120)
    report: dict[str, Any] = json.loads((output / "export_report.json").read_text())
    return report


@pytest.mark.parametrize(
    ("model", "objective", "drafter"),
    [
        ({}, {}, "latent_predictor"),
        ({"tie_embeddings": True, "norm_epsilon": 0.01}, {}, "latent_predictor"),
        ({}, {"name": "mtp", "horizon": 2}, "mtp"),
        ({}, {"name": "jtp", "horizon": 2}, "jtp"),
        ({"tie_embeddings": True}, {"name": "jtp", "horizon": 1}, "jtp"),
    ],
    ids=["nextlat", "tied", "mtp", "jtp", "tied-jtp"],
)
def test_layouts_export_equal_bytes(
    model: dict[str, Any], objective: dict[str, Any], drafter: str, tmp_path: Path, one_rank: Ranks, four_ranks: Ranks
) -> None:
    sections = {"model": model, "objective": objective}
    one_rank.run(save_given_weights, jobs.tiny_config(**sections), str(tmp_path / "one"))
    four_ranks.run(save_given_weights, jobs.tiny_config(**sections, parallel=TP2_PP2), str(tmp_path / "four"))
    reports = [export(tmp_path / name, tmp_path / f"{name}-export") for name in ("one", "four")]
    assert reports[0] == reports[1]
    assert reports[0]["max_logit_difference"] <= 1e-4
    for file in ("model.safetensors", "config.json", f"{drafter}/model.safetensors", f"{drafter}/config.json"):
        one, four = (tmp_path / f"{name}-export" / file for name in ("one", "four"))
        assert one.read_bytes() == four.read_bytes(), file
    assert sorted(path.name for path in (tmp_path / "one-export").iterdir() if path.is_dir()) == [drafter]
    base = load_file(tmp_path / "one-export" / "model.safetensors")
    assert ("lm_head.weight" in base) is not model.get("tie_embeddings", False)
    fetch = 6 if drafter == "jtp" else 0
    assert len(base) == 9 * 4 + 2 + ("lm_head.weight" in base) + fetch  # of a plain Llama, and nothing else
    if drafter != "jtp":
        check_root(tmp_path / "one-export")


@pytest.fixture(scope="module")
def trained(four_ranks: Ranks, text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    four_ranks.run(run_training, training_config(output, text_dataset, TP2_PP2, {}))
    return output


def test_trained_run_exports_and_loads_with_no_flag(trained: Path, text_dataset: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = export(trained / "checkpoints", trained / "export")
    assert report["max_logit_difference"] <= 1e-4
    assert report["tokenizer_round_trip"]
    assert report["tokenizer_ids_identical"]
    model = AutoModelForCausalLM.from_pretrained(trained / "export")
    assert model.config.vocab_size == 600
    tokenizer = AutoTokenizer.from_pretrained(trained / "export")
    text = "def f(x):\n\treturn  [x, 'é', '日本', 1234]\r\n# <s>, </s> and <pad> are text here"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    manifest = json.loads((text_dataset / "validation" / "manifest.json").read_text())
    assert tokenizer.eos_token_id == manifest["tokenizer"]["eos_id"]


def test_logit_check_sees_a_wrong_weight(trained: Path) -> None:
    """The negative control of `max_logit_difference`: one scaled matrix shows."""
    from nextlat_dist.checkpoint.commit import find_checkpoint
    from nextlat_dist.checkpoint.tensors import load_full_weights

    source = find_checkpoint(trained / "checkpoints")
    assert source is not None
    if not (trained / "export").exists():
        export(trained / "checkpoints", trained / "export")
    code = (
        "import sys, torch, yaml; from pathlib import Path\n"
        "from nextlat_dist.parallel.device import use_cpu_where_no_cuda\n"
        "use_cpu_where_no_cuda()\n"
        "from nextlat_dist.config.load import config_from_dict\n"
        "from nextlat_dist.checkpoint.tensors import load_full_weights\n"
        "from nextlat_dist.huggingface.export import max_logit_difference\n"
        "source, export = map(Path, sys.argv[1:])\n"
        "config = config_from_dict(yaml.safe_load((source / 'config.yaml').read_text()))\n"
        "weights = load_full_weights(source)\n"
        "weights['decoder.layers.2.mlp.linear_fc2.weight'] *= 1.5\n"
        "print(max_logit_difference(weights, config, export, torch.arange(40).view(2, 20)))\n"
    )
    arguments = [sys.executable, "-c", code, str(source), str(trained / "export")]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120).stdout
    assert float(printed.splitlines()[-1]) > 1e-3
    assert len(load_full_weights(source)) == 4 * 6 + 8


def test_bf16_export_rounds_the_same_weights(trained: Path) -> None:
    export(trained / "checkpoints", trained / "export32", "--dtype", "fp32", "--no-verify")
    export(trained / "checkpoints", trained / "export16", "--dtype", "bf16", "--no-verify")
    wide, narrow = (load_file(trained / name / "model.safetensors") for name in ("export32", "export16"))
    for name, tensor in wide.items():
        assert torch.equal(tensor.bfloat16(), narrow[name]), name


def test_trained_predictor_changes_no_greedy_token(trained: Path) -> None:
    from nextlat_dist.inference import load

    if not (trained / "export").exists():
        export(trained / "checkpoints", trained / "export")
    decoder = load(trained / "export", dtype=torch.float64)
    prompts = ["def f(", "class Error(Exception):\n    ", "import "]
    # The context is 48 positions; up to there, or to EOS.
    plain = decoder.generate(prompts, max_new_tokens=30, draft_length=0)
    for draft_length in (1, 3, 8):
        drafted = decoder.generate(prompts, max_new_tokens=30, draft_length=draft_length)
        assert [row.token_ids for row in drafted] == [row.token_ids for row in plain]
        assert sum(row.accepted for row in drafted) > 0
        assert sum(row.cycles for row in drafted) < sum(row.cycles for row in plain)


def test_predictor_of_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    from nextlat_dist.errors import UserError
    from nextlat_dist.huggingface.drafters.latent_predictor import load_predictor

    if not (trained / "export").exists():
        export(trained / "checkpoints", trained / "export")
    with pytest.raises(UserError, match="belongs to base weights"):
        load_predictor(trained / "export", base_sha256="0" * 64)


def test_an_export_drafts_from_the_ids_of_its_own_run(trained: Path, tmp_path: Path) -> None:
    import yaml

    from nextlat_dist.checkpoint.commit import find_checkpoint
    from nextlat_dist.config.load import config_from_dict
    from nextlat_dist.errors import UserError
    from nextlat_dist.huggingface.draft_vocabulary import count_run_data, coverage, most_frequent
    from nextlat_dist.huggingface.drafters.latent_predictor import load_predictor
    from nextlat_dist.huggingface.export import export_checkpoint

    checkpoint = find_checkpoint(trained / "checkpoints")
    assert checkpoint is not None
    counted = count_run_data(config_from_dict(yaml.safe_load((checkpoint / "config.yaml").read_text())))
    report = export_checkpoint(checkpoint, tmp_path / "export", check_logits=False, draft_vocabulary=100)
    predictor = load_predictor(tmp_path / "export", report["base_weights_sha256"])
    assert predictor is not None
    assert predictor.draft_vocabulary is not None
    assert torch.equal(predictor.draft_vocabulary, most_frequent(counted, 100))
    assert report["draft_vocabulary_size"] == 100
    assert 0.3 < report["draft_vocabulary_coverage"] == coverage(counted, predictor.draft_vocabulary) < 1
    with pytest.raises(UserError, match="less than the vocabulary of 600 ids"):
        export_checkpoint(checkpoint, tmp_path / "other", check_logits=False, draft_vocabulary=600)
    assert not (tmp_path / "other").exists()
