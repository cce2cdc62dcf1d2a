"""Settings that decide the rows of a run may not change on resume: each of the loader's is known to be one, or not."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config import load_config
from nextlat_dist.config.load import dump_config
from nextlat_dist.config.schema import DataConfig, RunConfig
from nextlat_dist.data.loader import RowLoader, Source
from nextlat_dist.data.packing import batch_digest
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.errors import UserError
from nextlat_dist.files import CONFIG_FILE, TRAINER_STATE_FILE
from nextlat_dist.training.state.resume import STREAM_KEYS, _incompatible, check_same_weights
from nextlat_dist.training.state.trainer_state import TrainerState

# Settings of the loader: {argument: (a value, another)}.
DECIDES: dict[str, tuple[Any, Any]] = {
    "sequence_length": (48, 32),
    "packing": ("concat", "pad"),
    "global_batch_size": (4, 8),
    "seed": (1234, 7),
    "shuffle": (True, False),
    "shuffle_window_records": (1, 3),
}
DOES_NOT: dict[str, tuple[Any, Any]] = {
    "workers": (0, 2),
    "vocab_size": (None, 600),
    "tokenizer_sha256": (None, None),  # refuses another dataset, and changes none
    "verify": ("first", "never"),
    "on_damage": ("fail", "quarantine"),  # what was lost is in the cursor
    "max_quarantined_fraction": (0.01, 0.5),
    "cache": (None, CacheSettings(Path("unused"), 1)),
}
# Compared with the checkpoint in another way, or its position: datasets, their order and weights.
HAS_ITS_OWN_CHECK = {"sources", "weight_changes", "cursor"}
LAYOUT = {"data_parallel_rank", "data_parallel_size"}

# The same of the keys of the `data` section.
CHECKED_BY_THE_DATASET = {"train", "sources", "weight_changes"}
NOT_OF_THE_STREAM = {
    *("validation", "tokenizer", "workers", "verify", "on_damage", "max_quarantined_fraction"),
    *("cache_dir", "cache_bytes", "log_batch_hashes"),
}


def test_every_setting_of_the_loader_is_known() -> None:
    arguments = set(inspect.signature(RowLoader.__init__).parameters) - {"self"}
    assert arguments == {*DECIDES, *DOES_NOT, *HAS_ITS_OWN_CHECK, *LAYOUT}
    assert {key for keys in STREAM_KEYS.values() for key in keys} == set(DECIDES)


def test_every_key_of_the_data_section_is_known() -> None:
    keys = {field.name for field in dataclasses.fields(DataConfig)}
    assert keys == {*STREAM_KEYS["data"], *CHECKED_BY_THE_DATASET, *NOT_OF_THE_STREAM}


def batches(dataset: Path, **changed: Any) -> list[str]:
    settings = {name: value for name, (value, _) in {**DECIDES, **DOES_NOT}.items()} | changed
    loader = RowLoader(dataset / "train", data_parallel_rank=0, data_parallel_size=1, **settings)
    try:
        return [batch_digest(loader.next_batch().row_digests()) for _ in range(60)]
    finally:
        loader.close()


@pytest.mark.parametrize("name", [*DECIDES, *DOES_NOT])
def test_a_setting_decides_or_does_not(name: str, text_dataset: Path) -> None:
    other = {**DECIDES, **DOES_NOT}[name][1]
    assert (batches(text_dataset, **{name: other}) != batches(text_dataset)) is (name in DECIDES)


def saved(directory: Path, config: RunConfig, step: int = 0) -> Path:
    """A checkpoint as far as the question whether this run may resume from it."""
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(dump_config(config))
    (directory / TRAINER_STATE_FILE).write_text(TrainerState(step=step, tokens=step * config.tokens_per_step).to_json())
    return directory


@pytest.mark.parametrize("path", [f"{section}.{key}" for section, keys in STREAM_KEYS.items() for key in keys])
def test_a_resume_with_another_value_is_refused(path: str, tmp_path: Path) -> None:
    value, other = DECIDES[path.partition(".")[2]]
    settings = ["training.micro_batch_size=1", "model.max_position_embeddings=512"]
    before, after = (load_config(None, [*settings, f"{path}={one}"]) for one in (value, other))
    checkpoint = saved(tmp_path / "step_00000000", before)
    assert _incompatible(before, checkpoint) == ""
    sentence = f"{checkpoint} was saved with {path}={value}, this run has {other}; change {path} back or use another "
    assert _incompatible(after, checkpoint) == sentence + "output_dir"


def test_a_run_that_has_trained_further_than_it_should_is_refused(tmp_path: Path) -> None:
    def config(tokens: int) -> RunConfig:
        return load_config(
            None, ["data.sequence_length=48", "training.global_batch_size=8", f"training.train_tokens={tokens}"]
        )

    checkpoint = saved(tmp_path / "step_00000006", config(2304), step=6)
    assert [_incompatible(config(tokens), checkpoint) for tokens in (2304, 2300, 9999)] == ["", "", ""]
    assert _incompatible(config(1920), checkpoint) == (
        f"training.train_tokens=1,920 ends at step 5, but {checkpoint} has done 6 steps (2,304 tokens); set "
        "training.train_tokens to 2304 or more, or use another output_dir for a shorter run"
    )


def with_sources(*names: str) -> DataConfig:
    sources = "[" + ", ".join(f"{{name: {name}, path: /{name}, weight: 1}}" for name in names) + "]"
    return load_config(None, [f"data.sources={sources}"]).data


def test_the_order_of_the_sources_may_not_change(tmp_path: Path, text_dataset: Path) -> None:
    state = TrainerState(datasets={"a": "1", "b": "2"})
    check_same_weights(with_sources("a", "b"), with_sources("a", "b"), state)
    check_same_weights(with_sources("new", "a", "b"), with_sources("a", "b"), state)
    with pytest.raises(UserError, match=r"^data\.sources are in the order b, a; this run was trained with a, b, and"):
        check_same_weights(with_sources("b", "a"), with_sources("a", "b"), state)

    def mixed(*names: str) -> list[list[int]]:
        sources = [Source(name, text_dataset / ("train" if name == "a" else "validation")) for name in names]
        loader = RowLoader(
            sources, sequence_length=48, packing="concat", global_batch_size=4, seed=1, shuffle=True,
            data_parallel_rank=0, data_parallel_size=1,
        )  # fmt: skip
        return [loader.next_batch().tokens[:, 0].tolist() for _ in range(2)]

    assert mixed("a", "b") != mixed("b", "a"), "what is refused does matter"
