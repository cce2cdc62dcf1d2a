"""`nextlat fit-drafter`: from an export to one whose drafter was fitted, with a base that is the same to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextlat_dist import cli
from nextlat_dist.data.packing import RowBatch
from nextlat_dist.errors import UserError
from nextlat_dist.files import TOKENIZER_FILE, file_sha256
from nextlat_dist.fitting import drafter as module
from nextlat_dist.fitting.drafter import documents, fit_drafter
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.inference import load
from nextlat_dist.inference.loading import llama_of
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import vocab_size
from nextlat_dist.tasks.path_star import PathStar
from tests.kit.exports import copying_model, prompt_of, tiny_config, write_export, write_kind
from tests.kit.form_exports import jtp_export
from tests.kit.task_exports import write_test_set

TASK = PathStar(arms=2, length=4, nodes=24)  # 31 ids, as the exports have


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert vocab_size(TASK) == 31
    return write_test_set(tmp_path_factory.mktemp("data") / "test", TASK, 200)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a drafter whose states are the embedding of the last token: easy to predict."""
    config = tiny_config()
    return write_export(tmp_path_factory.mktemp("plain") / "export", config, copying_model(config)[0], None)


def root_files(export: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in export.iterdir() if path.is_file()}


def accepted(export: Path) -> float:
    results = load(export, "cpu").generate([prompt_of(9, seed=s) for s in range(6)], max_new_tokens=24, draft_length=3)
    return sum(one.accepted for one in results) / sum(one.cycles for one in results)


def test_a_base_without_a_drafter_gets_one(plain: Path, data: Path, tmp_path: Path) -> None:
    before = root_files(plain)
    report = fit_drafter(
        plain, data, tmp_path / "fitted", steps=500, rows=8, length=64, width=64, lr=5e-3, progress=False
    )
    fitted = report["fitted_drafter"]
    assert fitted["loss_last"] < 0.3 * fitted["loss_first"]
    assert (fitted["began_with"], fitted["horizon"], fitted["width"]) == ("a new one", 2, 64)
    assert (fitted["steps"], fitted["tokens"]) == (500, 500 * 8 * 64)
    assert root_files(plain) == before
    after = root_files(tmp_path / "fitted")
    assert after.pop("export_report.json") is not None
    assert after == before
    prompts = [prompt_of(9), prompt_of(5)]
    texts = [
        [g.token_ids for g in load(export, "cpu").generate(prompts, max_new_tokens=20, draft_length=length)]
        for export, length in ((plain, 0), (tmp_path / "fitted", 3))
    ]
    assert texts[0] == texts[1]
    assert accepted(tmp_path / "fitted") > 1.5
    # The same call writes the same; what is there was written by it, and is replaced.
    first = file_sha256(tmp_path / "fitted/latent_predictor/model.safetensors")
    again = fit_drafter(
        plain, data, tmp_path / "fitted", steps=500, rows=8, length=64, width=64, lr=5e-3, progress=False
    )
    assert 0 < again["fitted_drafter"].pop("seconds") < 600
    assert again["fitted_drafter"] == {key: value for key, value in fitted.items() if key != "seconds"}
    assert file_sha256(tmp_path / "fitted/latent_predictor/model.safetensors") == first


def test_an_export_with_a_predictor_goes_on_with_it(data: Path, tmp_path: Path) -> None:
    export = write_kind(tmp_path / "right", "right")
    known = open_export(export).drafter
    assert known is not None
    options: dict[str, Any] = {"steps": 20, "rows": 2, "length": 64, "lr": 1e-4, "progress": False}
    refit = fit_drafter(export, data, tmp_path / "refit", **options)["fitted_drafter"]
    assert (refit["began_with"], refit["width"]) == ("its own", known.config.predictor_hidden_size)
    fresh = fit_drafter(export, data, tmp_path / "fresh", fresh=True, **options)["fitted_drafter"]
    assert (fresh["began_with"], fresh["width"]) == ("a new one", known.config.predictor_hidden_size)
    assert refit["loss_first"] < 0.01 * fresh["loss_first"]
    assert accepted(tmp_path / "refit") > 2.5 > accepted(tmp_path / "fresh")


def test_every_document_is_read_from_its_own_beginning(plain: Path, tmp_path: Path) -> None:
    export = write_kind(tmp_path / "random", "random")  # attention that looks back
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 19 + 4
    numbers = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12], dtype=np.int32)
    batch = RowBatch(tokens, numbers, numbers >= 0)
    pieces = documents(batch)
    assert [piece.tolist() for piece in pieces] == [tokens[0, :5].tolist(), tokens[0, 5:9].tolist(), tokens[1].tolist()]
    model = ExportModel(export, "cpu")
    states = module._states(llama_of(open_export(export), "cpu", torch.float32), pieces)
    for piece, own in zip(pieces, states, strict=True):
        torch.testing.assert_close(own, model.states(piece[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, ["--steps is 0"]),
        ({"rows": -1}, ["--rows is -1"]),
        ({"horizon": 0}, ["--horizon is 0"]),
        ({"width": 0}, ["--width is 0"]),
        ({"seed": -1}, ["--seed is -1"]),
        ({"lr": 0.0}, ["--lr is 0"]),
        ({"lr": float("nan")}, ["--lr is nan"]),
        ({"length": 2}, ["--length is 2", "above --horizon 2"]),
        ({"length": 1000}, ["--length is 1000", "128"]),
        ({"lr": 900.0, "steps": 50}, ["diverges", "--lr 900"]),
    ],
)
def test_what_cannot_be_is_a_sentence(
    plain: Path, data: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        fit_drafter(plain, data, tmp_path / "out", **{"steps": 2, "progress": False, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_others_wrote_stays(plain: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    for output in (tmp_path / "notes", plain):
        before = root_files(output)
        with pytest.raises(UserError, match="will not be replaced"):
            fit_drafter(plain, data, output, steps=2, progress=False)
        assert root_files(output) == before


def test_another_width_than_its_own_and_another_form_are_refused(data: Path, tmp_path: Path) -> None:
    export = write_kind(tmp_path / "export", "random")
    with pytest.raises(UserError, match=r"--width is 7.*--fresh"):
        fit_drafter(export, data, tmp_path / "out", width=7, progress=False)
    with pytest.raises(UserError, match=r"nextlat_jtp.*next_token"):
        fit_drafter(jtp_export(tmp_path / "jtp"), data, tmp_path / "out", progress=False)


def test_data_of_another_tokenizer_are_refused(plain: Path, data: Path, tmp_path: Path) -> None:
    """They may have as many ids: what they mean is another matter."""
    export = shutil.copytree(plain, tmp_path / "export")
    (export / TOKENIZER_FILE).write_bytes(b"another")
    with pytest.raises(UserError, match="tokenizer"):
        fit_drafter(export, data, tmp_path / "out", steps=2, length=32, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command(plain: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit-drafter", "--model", str(plain), "--data", str(data), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--steps", "3", "--rows", "2", "--length", "40", "--horizon", "1", "--width", "12"]) == 0
    shown, progress = capsys.readouterr()
    assert "fitting: 3/3, " in progress
    assert ", 0 s left" in progress
    assert "loss_last" in shown
    assert "a new one" in shown
    report = json.loads((tmp_path / "out/export_report.json").read_text())
    assert report["fitted_drafter"]["tokens"] == 3 * 2 * 40
    stored = open_export(tmp_path / "out").drafter
    assert stored is not None
    assert (stored.config.horizon, stored.config.predictor_hidden_size) == (1, 12)
    words[4] = str(tmp_path)  # no dataset
    assert cli.main(words) == 2
