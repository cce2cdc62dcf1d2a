"""Reading a configuration: files, overrides, types, unknown keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from nextlat_dist.config import RunConfig, config_from_dict, config_to_dict, dump_config, load_config
from nextlat_dist.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(None, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("seed", "training.seed"),
        ("outptu_dir", "output_dir"),
        ("modle.num_layers", "model"),
        ("trainig.seed", "training"),
        ("model.num_layer", "model.num_layers"),
        ("model.horizon", "objective.horizon"),
        ("objective.lambda_hiden", "objective.lambda_hidden"),
        ("parallel.tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ("data.sequence_lenght", "data.sequence_length"),
    ],
)
def test_unknown_key_names_itself_and_the_nearest(key: str, nearest: str) -> None:
    text = message(f"{key}=1")
    section = key.partition(".")[0]
    shown = key if section in config_to_dict(RunConfig()) else section
    assert text == f"unknown config key {shown!r}; the nearest known key is {nearest!r}"


def test_unknown_key_of_a_file_is_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  learning_rate: 1.0e-3\n")
    with pytest.raises(
        UserError, match=r"^unknown config key 'optimizer\.learning_rate'; the nearest known key is 'opt"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layers=two", "model.num_layers is 'two', it must be a number"),
        ("model.num_layers=2.5", "model.num_layers is 2.5, it must be of type int"),
        ("model.num_layers='2.5'", "model.num_layers is 2.5, it must be of type int"),
        ("model.num_layers=true", "model.num_layers is True, it must be of type int"),
        ("model.num_layers=null", "model.num_layers is None, it must be of type int"),
        ("model.num_layers=", "model.num_layers is None, it must be of type int"),
        ("model.num_layers=[2]", "model.num_layers is [2], it must be of type int"),
        ("model.num_query_groups=many", "model.num_query_groups is 'many', it must be a number"),
        ("optimizer.lr=false", "optimizer.lr is False, it must be of type float"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast', it must be a number"),
        ("optimizer.lr=.nan", "optimizer.lr is nan, it must be finite"),
        ("optimizer.lr=1e999", "optimizer.lr is inf, it must be finite"),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9, it must be a list"),
        ("optimizer.betas=[0.9, high]", "optimizer.betas[1] is 'high', it must be a number"),
        ("model.tie_embeddings=1", "model.tie_embeddings is 1, it must be of type bool"),
        ("model.tie_embeddings='yes'", "model.tie_embeddings is 'yes', it must be of type bool"),
        ("output_dir=[12]", "output_dir is [12], it must be of type str"),
        ("output_dir=null", "output_dir is None, it must be of type str"),
        (
            "objective.name=mtp2",
            "objective.name is 'mtp2', it must be one of next_token, nextlat, mtp, jtp, bst; the nearest is mtp",
        ),
        ("objective.name=null", "objective.name is None, it must be of type str"),
        ("parallel.zero_stage=4", "parallel.zero_stage is 4, it must be one of 0, 1, 2, 3"),
        ("parallel.zero_stage=true", "parallel.zero_stage is True, it must be one of 0, 1, 2, 3"),
        ("deepspeed=1", "deepspeed is 1, it must be a mapping"),
        ("model=3", "model is a section, it cannot be set to 3"),
        ("optimizer.lr.x=1", "optimizer.lr is {'x': 1}, it must be of type float"),
    ],
)
def test_wrong_type_names_key_value_and_type(override: str, sentence: str) -> None:
    assert message(override) == sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=3e-4", 3e-4),  # YAML 1.1 reads it as text
        ("optimizer.lr=3.0e-4", 3e-4),
        ("optimizer.lr=1", 1.0),
        ("training.train_tokens=1e9", 10**9),
        ("training.train_tokens=2_000_000", 2_000_000),
        ("training.train_tokens=2000000.0", 2_000_000),
        ("model.num_query_groups=null", None),
        ("model.num_query_groups=2", 2),
        ("optimizer.betas=[0, 0.5]", [0.0, 0.5]),
        ("model.tie_embeddings=true", True),
        ("parallel.zero_stage=2.0", 2),
        ("wandb.name=a=b", "a=b"),
        ("deepspeed.zero_optimization.overlap_comm=true", {"zero_optimization": {"overlap_comm": True}}),
    ],
)
def test_override_forms(override: str, expected: Any) -> None:
    value: Any = load_config(None, [override])
    for part in override.partition("=")[0].split("."):
        value = value if isinstance(value, dict) else getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.seed", "override 'training.seed' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        (
            "training.seed=[1",
            "the value of override 'training.seed=[1' is not valid YAML: line 1: expected ',' or ']', but got '<stream "
            "end>'; a text with such signs needs quotes, as in 'training.seed=\"…\"'",
        ),
    ],
)
def test_malformed_override(override: str, sentence: str) -> None:
    assert message(override) == sentence


def test_override_below_a_value() -> None:
    text = message("output_dir=runs", "output_dir.name=x")
    assert text == "override 'output_dir.name=x': output_dir is a value, not a section"


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  seed: 5\n  log_interval: 7\nwandb:\n")
    config = load_config(path, ["training.seed=6", "training.seed=8", "wandb.project=p"])
    assert (config.training.seed, config.training.log_interval, config.wandb.project) == (8, 7, "p")
    assert config.model == RunConfig().model


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- 1\n", "must hold a mapping of sections, it holds a list"),
        (b"model: [\n", "is not valid YAML: "),
        (b"\xff\xfe\x00", "is UTF-16, a config must be UTF-8; save it as UTF-8"),
        (b"\xfe\xff\x00a", "is UTF-16, a config must be UTF-8; save it as UTF-8"),
        (b"a: \xe9\n", "is not valid YAML: byte 3 is not UTF-8; save it as UTF-8"),
        (b"#" * (1 << 18) + b"\n", "is larger than 262,144 bytes, which no config is"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_as_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config .*none\.yaml: No such file.*--config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read the config .*: Is a directory"):
        load_config(tmp_path)


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == RunConfig() == load_config(None)


def test_dump_and_load_round_trip(tmp_path: Path) -> None:
    config = load_config(
        CONFIGS / "quickstart.yaml", ["optimizer.lr=1e-7", "deepspeed.a.b=[1, {c: null}]", "wandb.name='null'"]
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert config_from_dict(yaml.safe_load(dump_config(config))) == config


def test_dump_spells_out_every_key() -> None:
    dumped = yaml.safe_load(dump_config(RunConfig()))
    for section in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), section.name)
        if dataclasses.is_dataclass(value):
            assert set(dumped[section.name]) == {field.name for field in dataclasses.fields(value)}
        else:
            assert section.name in dumped


def test_config_from_dict_rejects_what_load_config_rejects() -> None:
    raw = config_to_dict(RunConfig())
    raw["model"]["num_layres"] = 3
    with pytest.raises(UserError, match=r"the nearest known key is 'model\.num_layers'"):
        config_from_dict(raw)
    with pytest.raises(UserError, match=r"^model.num_layers is 0, it must be positive$"):
        config_from_dict({"model": {"num_layers": 0}})


# The others are grids of ablations: they name a config.
RUNS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "base" not in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_of_the_repository_loads(path: Path) -> None:
    config = load_config(path, world_size=1)
    others = {load_config(other).output_dir for other in RUNS if other != path}
    assert config.output_dir not in others  # two configs never share a directory
    assert config.output_dir.startswith("runs/")
    assert "#" in path.read_text().splitlines()[0]


def test_the_gpt_twin_differs_in_objective_and_directory_only() -> None:
    ours = config_to_dict(load_config(CONFIGS / "quickstart.yaml"))
    twin = config_to_dict(load_config(CONFIGS / "quickstart_gpt.yaml"))
    assert (ours["objective"].pop("name"), twin["objective"].pop("name")) == ("nextlat", "next_token")
    assert (ours.pop("output_dir"), twin.pop("output_dir")) == ("runs/quickstart", "runs/quickstart_gpt")
    assert ours == twin


def test_hilps_weights_are_all_that_differs() -> None:
    ours = config_to_dict(load_config(CONFIGS / "quickstart.yaml"))
    other = config_to_dict(load_config(CONFIGS / "quickstart_hilp.yaml"))
    names = ("lambda_next_token", "lambda_hidden", "lambda_kl")
    assert [other["objective"].pop(name) for name in names] == [1, 10, 0.1]
    assert [ours["objective"].pop(name) for name in names] == [1, 1, 1]
    del ours["output_dir"], other["output_dir"]
    assert ours == other


def test_the_papers_run_is_the_papers() -> None:
    config = load_config(CONFIGS / "fineweb_edu_1p3b.yaml", world_size=64)
    assert (config.model.num_layers, config.model.num_attention_heads, config.model.hidden_size) == (22, 16, 2048)
    assert (config.model.ffn_size, config.model.vocab_size, config.predictor_hidden_size) == (5504, 50257, 6528)
    assert (config.tokens_per_step, config.total_steps) == (512 * 1024, 190_735)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (4e-4, [0.9, 0.95], 0.1)
    assert (config.schedule.name, config.schedule.warmup_tokens, config.schedule.decay_tokens) == ("wsd", 10**9, 10**10)
    objective = config.objective
    assert (objective.horizon, objective.lambda_hidden, objective.lambda_kl, config.optimizer.clip_grad) == (1, 1, 1, 1)
