"""Kinds of drafters: those of installed distributions are used, and nothing that lies in an export is ever imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import weights_sha256
from nextlat_dist.huggingface.drafters.catalogue import drafter_kind
from nextlat_dist.huggingface.drafters.format import save_drafter
from nextlat_dist.huggingface.drafters.latent_predictor import LATENT_PREDICTOR, LatentPredictorConfig
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.inference import load
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export

TOY = """
from dataclasses import dataclass, replace

from nextlat_dist.huggingface.drafters.format import DrafterKind
from nextlat_dist.huggingface.drafters.latent_predictor import LATENT_PREDICTOR, PREDICTOR_TENSORS
from nextlat_dist.inference.drafters.latent_predictor import LatentPredictorDrafter

KIND = replace(
    LATENT_PREDICTOR, name="toy", algorithm="toy", architecture="Toy", drafter="toy_drafters:build", constants={}
)


def build(stored, llama, graphs):
    drafter = LatentPredictorDrafter(stored.config, stored.weights, llama)
    drafter.longest = 1
    return drafter


def halved(weights, epsilon):
    from nextlat_dist.inference.drafters.latent_predictor import concat_step

    step = concat_step(weights, epsilon)
    return lambda h, embedded: step(h, embedded) / 2
"""
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Drafter: pass\n"


def install(folder: Path, entry_points: str) -> None:
    """A distribution with the module `toy_drafters`."""
    (folder / "toy_drafters.py").write_text(TOY)
    metadata = folder / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_export(tmp_path / "export", config, random_weights(config), None)


@pytest.fixture(autouse=True)
def forget_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toy_drafters", "evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def add_toy(export: Path, fusion: str = "concat") -> None:
    """A folder of the kind `toy` in the export."""
    digest = weights_sha256(open_export(export).weights)
    kind = drafter_kind("toy")
    save_drafter(export, kind, LatentPredictorConfig(32, 24, 31, 2, 1e-5, digest, fusion), random_predictor(32))


def test_an_installed_distribution_brings_a_kind(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", "[nextlat_dist.drafters]\ntoy = toy_drafters:KIND\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    add_toy(export)
    decoder = load(export, dtype=torch.float64)
    assert decoder.drafter is not None
    assert decoder.drafter.longest == 1
    assert decoder.drafter_directory == export / "toy"
    prompts = [[1, 5, 9]]
    [drafted] = decoder.generate(prompts, max_new_tokens=12, draft_length=1, ignore_eos=True)
    [plain] = decoder.generate(prompts, max_new_tokens=12, draft_length=0, ignore_eos=True)
    assert drafted.token_ids == plain.token_ids
    assert drafted.drafted > 0
    with pytest.raises(UserError, match="installed distributions bring latent_predictor, mtp, jtp, toy"):
        drafter_kind("toi")


def test_a_distribution_inside_an_export_is_not_installed(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when somebody runs the command inside the folder of an export that was downloaded."""
    install(export, "[nextlat_dist.drafters]\ntoy = toy_drafters:KIND\n")
    monkeypatch.syspath_prepend(export)
    add_toy(export)
    del sys.modules["toy_drafters"]
    with pytest.raises(UserError, match="nothing in an export is ever imported"):
        load(export)
    assert "toy_drafters" not in sys.modules


@pytest.mark.parametrize(
    ("folder", "says", "sentence"),
    [
        ("drafts", "evil:Drafter", "there is no drafter kind 'drafts'"),
        ("evil:Drafter", "evil:Drafter", "there is no drafter kind 'evil:Drafter'"),
        ("latent_predictor", "evil:Drafter", "has speculators_model_type 'evil:Drafter'"),
    ],
)
def test_code_next_to_the_weights_is_refused(
    export: Path,
    tmp_path: Path,
    folder: str,
    says: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    marker = tmp_path / "imported"
    (export / "evil.py").write_text(EVIL.format(marker=str(marker)))
    digest = weights_sha256(open_export(export).weights)
    config = LatentPredictorConfig(32, 24, 31, 2, 1e-5, digest)
    raw = LATENT_PREDICTOR.to_json(config) | {"speculators_model_type": says, "architectures": [says]}
    (export / folder).mkdir()
    (export / folder / "config.json").write_text(json.dumps(raw))
    save_file(random_predictor(32), export / folder / "model.safetensors")
    monkeypatch.chdir(export)
    monkeypatch.syspath_prepend(export)
    assert main(["generate", "--export", str(export), "--prompt", "x"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert not marker.exists()
    import evil  # type: ignore[import-not-found]  # noqa: F401  # the negative control: importing it shows

    assert marker.exists()


def test_code_of_a_tokenizer_is_refused(export: Path, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    (export / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config = {"tokenizer_class": "Drafter", "auto_map": {"AutoTokenizer": ["evil.Drafter", None]}}
    (export / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no tokenizer that transformers loads without code from there"):
        load(export).generate(["text"], max_new_tokens=3)
    assert not marker.exists()


def test_the_form_of_a_predictor_comes_from_its_entry(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fusion` in config.json; without the key it is the paper's, and that is not written."""
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", "[nextlat_dist.predictors]\nhalved = toy_predictors:ENTRY\n")
    (tmp_path / "site" / "toy_predictors.py").write_text(
        "from dataclasses import replace\nfrom nextlat_dist.model.predictors import CONCAT\n"
        "ENTRY = replace(CONCAT, name='halved', drafting='toy_drafters:halved')\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    digest = weights_sha256(open_export(export).weights)
    h, tokens = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4])
    steps = {}
    for fusion in ("concat", "halved"):
        config = LatentPredictorConfig(32, 24, 31, 2, 1e-5, digest, fusion)
        save_drafter(export, LATENT_PREDICTOR, config, random_predictor(32))
        stored = json.loads((export / "latent_predictor" / "config.json").read_text())
        assert stored.get("fusion") == (None if fusion == "concat" else "halved")
        drafter = load(export).drafter
        assert drafter is not None
        steps[fusion] = drafter.step(h, tokens)  # type: ignore[attr-defined]
    assert torch.equal(steps["concat"] / 2, steps["halved"])


def test_an_unknown_form_is_a_sentence(export: Path) -> None:
    digest = weights_sha256(open_export(export).weights)
    config = LatentPredictorConfig(32, 24, 31, 2, 1e-5, digest, "evil:Form")
    save_drafter(export, LATENT_PREDICTOR, config, random_predictor(32))
    with pytest.raises(UserError, match=r"evil:Form.*never for one that comes with a checkpoint"):
        load(export)
