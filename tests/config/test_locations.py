"""Paths and URLs of a configuration: `~` and variables are replaced, secrets are neither saved nor shown."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from nextlat_dist.config import RunConfig, config_from_dict, config_to_dict, dump_config, load_config
from nextlat_dist.config.keys import walk
from nextlat_dist.config.locations import located, secret_urls
from nextlat_dist.data.storage.open import URLS_VARIABLE, completed
from nextlat_dist.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/runs/a", "/home/me/runs/a"),
        ("~", "/home/me"),
        ("$HOME/runs", "/home/me/runs"),
        ("${HOME}/runs", "/home/me/runs"),
        ("/data/$RUN/${RUN}x", "/data/seven/sevenx"),
        ("a$$b", "a$b"),
        ("runs/~", "runs/~"),
        ("https://host/~me/$RUN", "https://host/~me/$RUN"),
        ("s3://bucket/${RUN}", "s3://bucket/seven"),
        ("https://me:${PW}@host/d?sig=${SIG}", "https://me:p%40%2Fw%41@host/d?sig=a%3D/b"),
    ],
)
def test_replaced(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "RUN": "seven", "PW": "p@/w%41", "SIG": "a%3D/b"}.items():
        monkeypatch.setenv(name, value)
    assert located(text, "output_dir") == expected


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("output_dir=$NO_SUCH/a", "output_dir is '$NO_SUCH/a', but the environment variable NO_SUCH is not set"),
        ("data.train=https://a:${NO_SUCH}@h/d", "data.train is 'https://a:${NO_SUCH}@h/d', but the environment var"),
        ("data.cache_dir=~no-such-user/x", "data.cache_dir is '~no-such-user/x', but there is no such user; write th"),
        (
            f"data.tokenizer=a/{'é' * 128}",
            f"data.tokenizer is 'a/{'é' * 128}', a path must have names of at most 255 b",
        ),
        (f"output_dir={'a/' * 2048}", "output_dir is 'a/a/"),
        ("data.sources=[{name: a, path: $NO_SUCH}]", "data.sources[0].path is '$NO_SUCH', but the environment varia"),
    ],
)
def test_what_cannot_be_replaced_is_named(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert str(caught.value).startswith(sentence)


def test_every_path_of_a_run_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no path, such as a name, is left alone."""
    locations = [name for name, key in walk(RunConfig) if key.is_location]
    assert locations == [
        "output_dir",
        "data.train",
        "data.sources[].path",
        "data.validation",
        "data.tokenizer",
        "data.cache_dir",
    ]
    monkeypatch.setenv("HOME", "/home/me")
    for name in (name for name in locations if "[" not in name):
        value = load_config(None, [f"{name}=~/x"])
        for part in name.split("."):
            value = getattr(value, part)
        assert value == "/home/me/x"
    assert load_config(None, ["data.sources=[{name: ~x, path: ~/x}]"]).data.sources[0].path == "/home/me/x"
    assert load_config(None, ["wandb.name=~/x"]).wandb.name == "~/x"


SECRET = "https://me:hunter2@host/data?sig=s3cr3t"


def test_secrets_stay_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "hunter2")
    given = [f"data.sources=[{{name: a, path: '{SECRET}'}}, {{name: b, path: 'https://me:${{PW}}@host/b'}}]"]
    config = load_config(None, [*given, "data.validation=https://host/v?sig=s3cr3t", f"deepspeed.monitor.url={SECRET}"])
    assert [source.path for source in config.data.sources] == [SECRET, "https://me:hunter2@host/b"]
    assert config.data.validation == "https://host/v?sig=s3cr3t"
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        text = dump_config(copied)
        assert "hunter2" not in text
        assert "s3cr3t" not in text
        assert "path: https://***@host/data?***" in text
        assert "path: https://me:${PW}@host/b" in text
    assert config_to_dict(config)["data"]["validation"] == "https://host/v?***"
    assert config_to_dict(config)["deepspeed"] == {"monitor": {"url": "https://***@host/data?***"}}
    assert secret_urls(config) == [SECRET, "https://me:hunter2@host/b", "https://host/v?sig=s3cr3t"]


def test_a_saved_configuration_is_told_where_its_secrets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = config_to_dict(load_config(None, [f"data.train={SECRET}"]))
    train = config_from_dict(saved).data.train
    assert train is not None
    with pytest.raises(UserError) as caught:
        completed(train)
    assert str(caught.value).startswith(
        "https://***@host/data?*** was saved without its password or signature; give the whole URL again"
    )
    monkeypatch.setenv(URLS_VARIABLE, f"https://me:other@host2/data?sig=1 {SECRET}")
    assert completed(train) == SECRET
    assert completed("https://***@host3/data?***".replace("host3", "host2")) == "https://me:other@host2/data?sig=1"
    with pytest.raises(UserError, match="was saved without"):
        completed("https://***@host4/data?***")
    assert completed("https://host/a***b?x=***y") == "https://host/a***b?x=***y"


def test_a_configuration_from_elsewhere_reads_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "hunter2")
    train = config_from_dict({"data": {"train": "https://evil/${PW}"}}).data.train
    assert train == "https://evil/${PW}"
    with pytest.raises(UserError, match="names an environment variable, which is replaced only"):
        completed(train)


def test_messages_about_a_url_have_no_secret(tmp_path: Path) -> None:
    for overrides in (
        [f"data.train={SECRET}", "data.sources=[{name: a, path: b}]"],
        [f"training.seed={SECRET}"],
        [SECRET.replace("=", "")],
        [f"data.tain={SECRET}"],
        [f"data.train=[{SECRET}]"],
    ):
        with pytest.raises(UserError) as caught:
            load_config(None, overrides)
        assert "hunter2" not in str(caught.value)
        assert "s3cr3t" not in str(caught.value)
