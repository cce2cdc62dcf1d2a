"""The comb's loop writes the base model's greedy tokens, and second choices are hit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nextlat_dist.bench import comb_drafts
from nextlat_dist.bench.comb_drafts import CombLoop
from nextlat_dist.inference import load
from tests.kit.exports import copying_model, tiny_config, write_export, write_tokenizer


def noisy_export(directory: Path, **changes: object) -> Path:
    """A predictor that is nearly right: now and then the base's token is its second choice."""
    config = tiny_config(**changes)
    weights, predictor = copying_model(config)
    noise = torch.randn(predictor["linear_out.weight"].shape, generator=torch.Generator().manual_seed(2))
    predictor["linear_out.weight"] += 0.25 * noise
    return write_export(directory, config, weights, predictor)


@pytest.mark.parametrize(("depth", "teeth"), [(0, 0), (3, 0), (1, 1), (4, 4), (5, 2)])
def test_tokens_are_the_base_models(tmp_path: Path, depth: int, teeth: int) -> None:
    decoder = load(noisy_export(tmp_path), "cpu", torch.float64)
    hits = 0
    for start in range(3, 31):
        expected = decoder.generate([[1, start]], max_new_tokens=30, draft_length=0, ignore_eos=True)[0].token_ids
        loop = CombLoop(decoder, depth, teeth)
        assert loop.run([1, start], 30) == expected
        hits += loop.hits
    assert (hits > 5) == (teeth > 0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = tmp_path / "export"
    export.mkdir()
    size = write_tokenizer(export)
    noisy_export(export, vocab_size=size)
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "code.txt").write_text("return self")
    json_path = tmp_path / "out.json"
    arguments = ["--export", str(export), "--prompts", str(prompts), "--quick", "--json", str(json_path)]
    assert comb_drafts.main(arguments) == 0
    assert "best comb / best chain" in capsys.readouterr().out
    content = json.loads(json_path.read_text())
    depths = comb_drafts.QUICK["depths"]
    drafted = [(kind, depth) for depth in range(1, depths + 1) for kind in comb_drafts.KINDS]
    assert [(row["drafts"], row["depth"]) for row in content["rows"]] == [("plain", 0), *drafted]
    assert content["summary"]["comb_to_chain"] > 0
    (export / "latent_predictor" / "config.json").unlink()
    for file in (export / "latent_predictor").iterdir():
        file.unlink()
    (export / "latent_predictor").rmdir()
    assert comb_drafts.main(arguments) == 2
    assert "has no latent predictor" in capsys.readouterr().err
