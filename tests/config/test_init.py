"""The file of `nextlat init`: the preset, every key, every description; and the reference made of the same schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nextlat_dist.cli import main
from nextlat_dist.config import RunConfig, config_to_dict, load_config
from nextlat_dist.config.init import commented_yaml, presets, starting_config
from nextlat_dist.config.keys import walk
from nextlat_dist.config.reference import reference_markdown
from nextlat_dist.config.shipped import shipped_configs


@pytest.mark.parametrize("preset", [None, "quickstart", "fineweb", *sorted(presets())])
def test_the_file_is_the_preset_with_every_key_and_description(preset: str | None, tmp_path: Path) -> None:
    config = starting_config(preset, [])
    path = tmp_path / "run.yaml"
    path.write_text(commented_yaml(config, preset))
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text()) == config_to_dict(config)
    comments = " ".join(line.partition("#")[2].strip() for line in path.read_text().splitlines() if "#" in line)
    for name, key in walk(RunConfig):
        assert " ".join(key.help.split()) in comments, name
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_lists_of_sections_and_texts_that_yaml_would_misread_come_back(tmp_path: Path) -> None:
    overrides = ["data.sources=[{name: 'a # b', path: 'x: y'}, {name: 'no', path: 'null', weight: 0.5}]"]
    overrides += ["data.weight_changes=[{at_tokens: 5000, weights: {'a # b': 0, 'no': 1e-9}}]", "wandb.name='1e5'"]
    config = starting_config(None, [*overrides, "deepspeed.a.b=[1, {c: null}]"])
    path = tmp_path / "run.yaml"
    path.write_text(commented_yaml(config))
    assert load_config(path) == config


def test_presets_are_the_shipped_runs() -> None:
    known = presets()
    assert {"quickstart", "fineweb", "paper/path_star", "cpu/hmm"} <= set(known)
    assert not any(name.startswith("ablations/") for name in known)
    assert known["fineweb"] == shipped_configs()["fineweb_edu_1p3b"]


def test_the_command_writes_a_new_file_and_replaces_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.yaml"
    command = ["init", "--preset", "quickstart", "--output", str(path)]
    assert main([*command, "training.seed=7"]) == 0
    assert load_config(path).training.seed == 7
    before = path.read_text()
    assert main(command) == 2
    assert f"--output {path} exists, it must be a new file" in capsys.readouterr().err
    assert path.read_text() == before
    assert main(["init"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == config_to_dict(RunConfig())
    assert main(["init", "--preset", "quickstrat"]) == 2
    assert "the nearest is 'quickstart'" in capsys.readouterr().err


def test_the_reference_has_every_key_with_its_default_and_description() -> None:
    page = reference_markdown()
    for name, key in walk(RunConfig):
        section = name.rpartition(".")[0]
        table = page.partition(f"## {section}\n")[2] if section else page
        (row,) = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith(f"| `{key.name}` |")]
        assert key.help in row
    rows = page.splitlines()
    assert "| `num_query_groups` | int or null | `null` | key/value heads; null: num_attention_heads; must be " in page
    assert "| `zero_stage` | `0`, `1`, `2`, `3` | `1` | DeepSpeed's ZeRO; a pipeline allows 0 and 1 |" in rows
    assert "| `path` | str | (required) | directory or URL with manifest.json |" in rows
    assert "| `betas` | list of float | `[0.9, 0.95]` | decay of AdamW's two averages; must be two numbers in [" in page
