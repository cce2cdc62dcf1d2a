"""A run whose data needs a password and a signature: it trains, resumes, and writes neither of them."""

from __future__ import annotations

from pathlib import Path

from nextlat_dist.config import config_from_dict, load_config
from nextlat_dist.files import CONFIG_FILE
from tests.kit.harness import Ranks
from tests.kit.servers import file_server
from tests.kit.training.runs import logged, run_training_as_typed, training_config

SECRETS = (b"hunter2", b"s3cr3t")


def test_nothing_written_has_the_password(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    output = tmp_path / "run"
    with file_server(text_dataset) as server:
        host = server.address.removeprefix("http://")
        urls = [f"http://me:hunter2@{host}/{split}?sig=s3cr3t" for split in ("train", "validation")]
        raw = training_config(output, text_dataset, {"zero_stage": 1}, {"micro_batch_size": 2})
        raw["data"] |= dict(zip(("train", "validation"), urls, strict=True)) | {"cache_dir": str(tmp_path / "cache")}
        raw["wandb"] = {"mode": "offline"}
        raw["checkpoint"] = {"save_interval": 3}
        words = ["nextlat", "train", *(f"data.train={url}" for url in urls)]
        raw["training"]["train_tokens"] = 3 * 4 * 48
        one_rank.run(run_training_as_typed, raw, words)
        raw["training"]["train_tokens"] = 6 * 4 * 48
        one_rank.run(run_training_as_typed, raw, words)
        assert sorted(logged(output)) == [1, 2, 3, 4, 5, 6]
        assert any("sig=s3cr3t" in request.path for request in server.requests)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if any(secret in path.read_bytes() for secret in SECRETS)] == []
    saved = (output / CONFIG_FILE).read_text()
    assert f"train: http://***@{host}/train?***" in saved
    assert load_config(output / CONFIG_FILE).data.validation == f"http://***@{host}/validation?***"
    assert config_from_dict(raw).data.train == urls[0]
