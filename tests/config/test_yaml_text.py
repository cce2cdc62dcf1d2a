"""Text that YAML guesses, drops or grows in silence: read as written, or refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config import RunConfig, dump_config, load_config
from nextlat_dist.config.read import read_yaml
from nextlat_dist.config.yaml_text import DEEPEST, LARGEST, YamlError, parse
from nextlat_dist.errors import UserError

BOMB = "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {seed: 1}\nmodel: {}\ntraining: {seed: 2}\n", "'training' is given twice, in line 1 and in line 3"),
        (
            "training:\n  seed: 1\n  log_interval: 2\n  seed: 3\n",
            "'training.seed' is given twice, in line 2 and in lin",
        ),
        ("data: {sources: [{name: a},\n {name: b,\n name: c}]}", "'data.sources[1].name' is given twice, in line 2 an"),
        ("'a': 1\na: 2\n", "'a' is given twice, in line 1 and in line 2; keep one"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: the tag '!!python/object/apply:os.getcwd' is not read"),
        ("a: !!binary aGk=\n", "line 1: the tag '!!binary' is not read; leave it out"),
        ("a: !mine 3\n", "line 1: the tag '!mine' is not read"),
        ("\na: " + "[" * 40, f"line 2: more than {DEEPEST} levels of nesting"),
        ("a: " + "{a: " * 100_000, f"line 1: more than {DEEPEST} levels of nesting"),
        (
            "a: &a [l, l, l, l, l, l, l, l, l]\n" + BOMB,
            f"line 6: with its aliases written out this has more than {LARGEST:,}",
        ),
        ("a: &a {b: *a}\n", "line 1: *a stands inside of what it names"),
        ("a: *b\n", "line 1: *b has no anchor &b before it"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document begins; a file holds one"),
        ("? [a, b]\n: 1\n", "line 1: a key must be one word, not a list or a mapping"),
        ("<<: 3\n", "line 1: << takes a mapping, or a list of them"),
        ("a:\n\t- 1\n", "line 2: found character '\\t' that cannot start any token"),
    ],
    ids=lambda value: value[:24].encode("unicode_escape").decode(),
)
def test_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse(text)
    assert str(caught.value).startswith(message[: len(str(caught.value))])
    assert len(str(caught.value)) < 300


def test_a_deep_chain_of_aliases_is_as_deep_as_it_is_written_out() -> None:
    chain = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(40))
    with pytest.raises(YamlError, match=f"more than {DEEPEST} levels of nesting"):
        parse(chain)


def test_the_file_is_named_with_key_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {seed: 7}\noptimizer: {lr: 1.0e-4}\ntraining: {log_interval: 5}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path} is not valid YAML: 'training' is given twice, in line 1 and in line 3; keep one"
    )


def loaded(override: str) -> Any:
    value: Any = load_config(None, [override])
    for part in override.partition("=")[0].split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("wandb.name=007", "007"),
        ("wandb.name=1e3", "1e3"),
        ("wandb.name=off", "off"),
        ("wandb.name=2024-05-06", "2024-05-06"),
        ("wandb.name=0x_", "0x_"),
        ("wandb.name=~", None),
        ("wandb.name='~'", "~"),
        ("wandb.name=run #3", "run #3"),
        ("output_dir=0123", "0123"),
        ("output_dir=12", "12"),
        ("output_dir=2024-99-99", "2024-99-99"),
        ("training.seed=9007199254740993", 9007199254740993),
        ('training.seed="9007199254740993"', 9007199254740993),
        ("training.train_tokens=1e9", 10**9),
        ("training.train_tokens='1.5e3'", 1500),
        ("training.seed=0x10", 16),
        ("training.seed=0", 0),
        ("model.tie_embeddings=on", True),
        ("model.tie_embeddings=No", False),
        ("deepspeed.x=2024-05-06", "2024-05-06"),
        ("deepspeed.x=1:30", "1:30"),
        ("deepspeed.x=[1, 1.5, true, ~, 0x10, text]", [1, 1.5, True, None, 16, "text"]),
    ],
)
def test_a_value_is_what_is_written(override: str, value: Any) -> None:
    found = loaded(override)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "training.seed=0123",
            "training.seed is 0123, a number must not begin with 0; write 123, or '0123' in quotes f",
        ),
        (
            "training.seed=007",
            "training.seed is 007, a number must not begin with 0; write 7, or '007' in quotes for th",
        ),
        ("training.seed=1:30", "training.seed is '1:30', it must be a number"),
        ("training.seed=0x_", "training.seed is '0x_', it must be a number"),
        ("training.seed=2024-05-06", "training.seed is '2024-05-06', it must be a number"),
        ("deepspeed.x=[0123]", "deepspeed.x is ['0123']: a number must not begin with 0; write 123"),
        ("checkpoint.resume=no", "checkpoint.resume is 'no', it must be one of auto, never, must"),
        ("model.tie_embeddings=y", "model.tie_embeddings is 'y', it must be of type bool"),
        (f"training.seed={'9' * 400}", "training.seed is inf, it must be of type int"),
        (f"training.seed={'9' * 5000}", "training.seed is inf, it must be of type int"),
        (f"optimizer.lr={'9' * 400}", "optimizer.lr is inf, it must be finite"),
        (f"output_dir=[{'a, ' * 1_000}]", "output_dir is ['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', ...], it must be"),
        ('output_dir="a\\0b"', "output_dir is 'a\\x00b', it must be text without NUL and half characters"),
        ('output_dir="\\uD800"', "output_dir is '\\ud800', it must be text without NUL and half characters"),
    ],
    ids=lambda value: value[:32],
)
def test_or_refused_with_the_way_to_write_it(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(override)
    assert str(caught.value).startswith(sentence)
    assert len(str(caught.value)) < 400


def test_a_number_of_python_that_no_float_holds_is_refused() -> None:
    from nextlat_dist.config import config_from_dict

    with pytest.raises(UserError, match=r"^optimizer\.lr is inf, it must be finite$"):
        config_from_dict({"optimizer": {"lr": 10**400}})


def test_anchors_and_merge_keys_are_read_and_not_shared(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  sources:\n  - &first {name: a, path: one, weight: 2}\n  - {<<: *first, name: b}\n"
        "deepspeed: {x: &x {k: 1}, y: *x}\n"
    )
    config = load_config(path, ["deepspeed.y.k=2"])
    assert [(source.name, source.path, source.weight) for source in config.data.sources] == [
        ("a", "one", 2.0),
        ("b", "one", 2.0),
    ]
    assert config.deepspeed == {"x": {"k": 1}, "y": {"k": 2}}


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbftraining: {seed: 5}\n")
    assert load_config(path).training.seed == 5
    assert list(read_yaml(path)) == ["training"]


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match="larger than"):
        load_config(Path("/dev/zero"))


def test_a_section_of_nothing_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: ~\nwandb:\ndeepspeed: null\n")
    config = load_config(path, ["training.seed=3", "deepspeed.a=1"])
    assert (config.training.seed, config.wandb, config.deepspeed) == (3, RunConfig().wandb, {"a": 1})


@pytest.mark.parametrize("name", ["007", "1e3", "off", "2024-05-06", "~x", "null", "0x10", "1:30", "=", "- a", "é"])
def test_what_is_dumped_is_read_back(tmp_path: Path, name: str) -> None:
    config = RunConfig()
    config.wandb.name = name
    config.deepspeed = {"text": name, "list": [name, 1e9, 10**9, None, True, 1e-5]}
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
