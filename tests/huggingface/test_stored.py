"""Files of an export that are damaged, edited or foreign: every one is a sentence that names the file and the rule."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.speculative.hugging_face import HuggingFace
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.huggingface.tokenizer import load_tokenizer
from nextlat_dist.inference.loading import decoder_of
from nextlat_dist.inference.speculative.calibration import Calibration
from tests.kit.exports import calibration, random_predictor, random_weights, tiny_config, write_export, write_tokenizer

Change = Callable[[Path], object]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "export"
    directory.mkdir()
    config = tiny_config(vocab_size=write_tokenizer(directory))
    write_export(directory, config, random_weights(config), random_predictor(config.hidden_size))
    calibration().save(directory / "latent_predictor")
    return directory


def edit(name: str, change: Callable[[Any], object]) -> Change:
    def run(export: Path) -> None:
        raw = json.loads((export / name).read_text())
        change(raw)
        (export / name).write_text(json.dumps(raw))

    return run


def put(*keys: Any, value: Any) -> Callable[[Any], object]:
    def run(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return run


def tensor(name: str, tensor_name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def run(export: Path) -> None:
        found = {key: value.clone() for key, value in load_file(export / name).items()}
        found[tensor_name] = change(found[tensor_name]).contiguous()
        save_file(found, export / name)

    return run


def cut(name: str, size: int) -> Change:
    return lambda export: (export / name).write_bytes((export / name).read_bytes()[:size])


CONFIG, INDEX, DRAFTER = "config.json", "model.safetensors.index.json", "latent_predictor/config.json"
DAMAGES: dict[str, tuple[Change, str]] = {
    "weights cut": (cut("model.safetensors", 900), r"model\.safetensors is damaged or no safetensors file"),
    "weights empty": (cut("model.safetensors", 0), r"model\.safetensors is damaged or no safetensors file"),
    "weights gone": (lambda e: (e / "model.safetensors").unlink(), r"model\.safetensors cannot be read \(No such file"),
    "config cut": (cut(CONFIG, 40), r"config\.json is no JSON \("),
    "config bytes": (lambda e: (e / CONFIG).write_bytes(b"\xff\xfe{"), r"config\.json is not UTF-8 text"),
    "config list": (lambda e: (e / CONFIG).write_text("[1]"), r"config\.json holds \[1\], but it must hold an object"),
    "config deep": (lambda e: (e / CONFIG).write_text("[" * 99_999), r"config\.json is (nested too deeply|no JSON)"),
    "config digits": (lambda e: (e / CONFIG).write_text(f'{{"a": {"9" * 5000}}}'), r"config\.json is no JSON"),
    "no layers": (edit(CONFIG, lambda raw: raw.pop("num_hidden_layers")), r"config\.json has no num_hidden_layers"),
    "layers text": (
        edit(CONFIG, put("num_hidden_layers", value="2")),
        r"has num_hidden_layers '2', but it must be a whole number from 1 to",
    ),
    "layers many": (
        edit(CONFIG, put("num_hidden_layers", value=3)),
        r"has no tensor model\.layers\.2\.input_",
    ),
    "heads": (edit(CONFIG, put("num_key_value_heads", value=3)), r"num_key_value_heads 3, but it must divide num_att"),
    "epsilon": (edit(CONFIG, put("rms_norm_eps", value=-1)), r"has rms_norm_eps -1, but it must be a finite number"),
    "theta": (edit(CONFIG, put("rope_parameters", "rope_theta", value="x")), r"has rope_parameters\.rope_theta 'x'"),
    "positions": (edit(CONFIG, put("max_position_embeddings", value=10**9)), r"has max_position_embeddings 1000000000"),
    "quantised": (edit(CONFIG, put("quantization_config", value={"bits": 4})), r"has quantization_config .*runs None"),
    "eos": (
        edit("generation_config.json", put("eos_token_id", value="x")),
        r"eos_token_id 'x', but it must be a",
    ),
    "bos": (
        edit("generation_config.json", put("bos_token_id", value=99999)),
        r"bos_token_id 99999, but it",
    ),
    "shape": (
        tensor("model.safetensors", "model.norm.weight", lambda old: old[:-1]),
        r"has model\.norm\.weight of shape \[31\], but its config\.json asks for \[32\]",
    ),
    "integers": (
        tensor("model.safetensors", "model.norm.weight", lambda old: old.int()),
        r"has model\.norm\.weight in int32, but weights must be fp32",
    ),
    "index away": (
        edit(INDEX, put("weight_map", "model.norm.weight", value="../model.safetensors")),
        r"weight_map\.model\.norm\.weight '\.\./model\.safetensors', but it must be the name of a safetensors file",
    ),
    "index none": (edit(INDEX, lambda raw: raw.pop("weight_map")), r"index\.json has no weight_map"),
    "horizon": (edit(DRAFTER, put("horizon", value=True)), r"has horizon True, but it must be a whole number from 1"),
    "drafter epsilon": (
        edit(DRAFTER, put("layer_norm_epsilon", value="a")),
        r"layer_norm_epsilon 'a', but it",
    ),
    "drafter hidden": (edit(DRAFTER, put("hidden_size", value=64)), r"has hidden_size 64, but the base has 32"),
    "drafter hash": (
        edit(DRAFTER, put("base_weights_sha256", value=5)),
        r"base_weights_sha256 5, but it must be",
    ),
    "drafter cut": (cut("latent_predictor/model.safetensors", 300), r"latent_predictor/model\.safetensors is damaged"),
    "drafter shape": (
        tensor("latent_predictor/model.safetensors", "linear_mid.weight", lambda old: old[:-1]),
        r"has linear_mid\.weight of shape",
    ),
    "tokenizer cut": (cut("tokenizer.json", 400), r"tokenizer\.json is no JSON"),
    "tokenizer model": (edit("tokenizer.json", put("model", "type", value="x")), r"has no tokenizer that transformers"),
    "tokenizer length": (
        edit("tokenizer_config.json", put("model_max_length", value="x")),
        r"has no tokenizer that transformers",
    ),
    "tokenizer class": (
        edit("tokenizer_config.json", put("eos_token", value=5)),
        r"has no tokenizer that transformers",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence(name: str, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, sentence = DAMAGES[name]
    change(export)
    assert main(["generate", "--export", str(export), "--prompt", "alpha", "--draft-length", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    with pytest.raises(UserError, match=sentence):
        decoder_of(open_export(export)).generate(["alpha"], max_new_tokens=2, draft_length=1)


CALIBRATIONS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no version": (lambda raw: raw.pop("format_version"), "has no format_version"),
    "version text": (put("format_version", value="1"), "format_version '1'"),
    "device": (put("device", value=3), "device 3, but it must be a text"),
    "no device": (lambda raw: raw.pop("device"), "has no device"),
    "costs list": (put("costs", value=[]), r"costs \[\], but it must be an object"),
    "draft text": (put("costs", "draft", "1", value="0.1"), "costs.draft.1 '0.1'"),
    "draft negative": (put("costs", "draft", "1", value=-1), "costs.draft.1 -1"),
    "draft infinite": (put("costs", "draft", "1", value=float("inf")), "costs.draft.1 inf"),
    "draft true": (put("costs", "draft", "1", value=True), "costs.draft.1 True"),
    "draft rows": (put("costs", "draft", "zero", value=1.0), "costs.draft.zero, but keys there"),
    "verify zero": (put("costs", "verify", "1", "2", value=0.0), "costs.verify.1.2 0.0"),
    "verify width": (put("costs", "verify", "1", "0", value=1.0), "costs.verify.1.0, but keys there"),
    "verify empty": (put("costs", "verify", value={}), "has nothing in costs.verify"),
    "begin none": (put("costs", "begin", value=None), "has no costs.begin"),
    "temperature": (put("acceptance", 0, "temperature", value=float("nan")), "temperature nan"),
    "share": (put("acceptance", 0, "by_position", value=[1.5]), r"by_position\[0\] 1.5"),
    "shares": (put("acceptance", 1, "by_position", value="x"), "by_position 'x'"),
    "no share": (put("acceptance", 1, "by_position", value=[]), "shares by position"),
    "weights": (put("acceptance", 0, "confidence", value=[1.0, 2.0]), "three weights"),
    "weight": (put("acceptance", 0, "confidence", value=[1.0, None, 2.0]), r"confidence\[1\] None"),
    "entry": (put("acceptance", 0, value=7), r"acceptance\[0\] 7, but it must be an object"),
    "measured on": (put("measured_on", value="x"), "measured_on 'x', but it must be an object"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_every_value_of_a_calibration_is_checked(name: str, tmp_path: Path) -> None:
    change, reason = CALIBRATIONS[name]
    raw = json.loads(calibration().save(tmp_path).read_text())
    change(raw)
    (tmp_path / "calibration.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"is not a calibration of format_version 1, it .*{reason}.*; write it again"):
        Calibration.load(tmp_path)


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_nothing_that_lies_in_an_export_is_run(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code and pickles wherever transformers, torch or we could find them; every way that opens an export."""
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    names = ("own_code", "configuration_llama", "modeling_llama", "tokenization", "__init__")
    for folder in (export, export / "latent_predictor", export / "custom_generate"):
        folder.mkdir(exist_ok=True)
        for name in (*names, "generate", "conftest", "sitecustomize"):
            (folder / f"{name}.py").write_text(code)
    for name in ("pytorch_model.bin", "tokenizer.pkl", "latent_predictor/pytorch_model.bin", "training_args.bin"):
        (export / name).write_bytes(pickle.dumps(Trap(marker)))
    own = {"AutoConfig": "own_code.C", "AutoModelForCausalLM": "own_code.M", "AutoModel": "own_code.M"}
    edit("config.json", put("auto_map", value={**own, "AutoTokenizer": ["own_code.T", "own_code.T"]}))(export)
    edit("tokenizer_config.json", put("auto_map", value={"AutoTokenizer": ["own_code.T", "own_code.T"]}))(export)
    monkeypatch.chdir(export)
    monkeypatch.setattr("sys.stdin", (tmp_path / "typed").open("w+"))
    for arguments in (["generate", "--prompt", "alpha"], ["chat"]):
        assert main([*arguments, "--export", str(export), "--max-new-tokens", "2"]) == 0, capsys.readouterr().err
    load_tokenizer(export)
    HuggingFace(export, torch.device("cpu"), torch.float32)
    assert not marker.exists()
    edit("tokenizer_config.json", put("tokenizer_class", value="OwnTokenizer"))(export)
    main(["generate", "--prompt", "alpha", "--export", str(export), "--max-new-tokens", "2"])
    (export / "model.safetensors").unlink()
    assert main(["generate", "--prompt", "alpha", "--export", str(export)]) == 2
    (export / "model.safetensors.index.json").unlink()
    assert main(["generate", "--prompt", "alpha", "--export", str(export)]) == 2
    assert "weights in pickles (*.bin) are never opened" in capsys.readouterr().err
    with pytest.raises(OSError, match="safetensors"):
        HuggingFace(export, torch.device("cpu"), torch.float32)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))  # the trap works
    assert marker.exists()
