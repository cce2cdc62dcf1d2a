"""`nextlat train --dry-run`: everything that can be checked and said without building a model or writing a file.

Data and tokenizer are opened where they are there: what a run would refuse of them is refused here. One that is not
there is said to be missing, since a dry run may be on another machine than the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nextlat_dist.config.load import dump_config
from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import RowLoader, Source
from nextlat_dist.data.shard_format import MANIFEST_FILE
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.parallel.environment import launched_number
from nextlat_dist.plan.describe import data_parallel_size, describe, describe_stages
from nextlat_dist.training.engine.deepspeed_config import deepspeed_config


def dry_run(config: RunConfig) -> str:
    """Description, stages, what is there of the data, resolved config.

    Raises:
        UserError: what `train` would refuse on so many ranks (`WORLD_SIZE`, or the fewest that `parallel` needs).
    """
    world = _world_size(config)
    validate(config, world)
    dp = data_parallel_size(config, world)
    deepspeed_config(config, dp)
    return "\n".join([describe(config, world), describe_stages(config), *_data(config), "", dump_config(config)])


def _world_size(config: RunConfig) -> int:
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    return launched_number("WORLD_SIZE", tp * pp, least=1)


def _data(config: RunConfig) -> Iterator[str]:
    """A line for each dataset and for the tokenizer."""
    data = config.data
    tokenizer = None
    if data.tokenizer is not None and not Path(data.tokenizer).exists():
        yield f"tokenizer   {data.tokenizer} is not here: not checked"
    elif data.tokenizer is not None:
        tokenizer = Tokenizer(Path(data.tokenizer)).sha256
        yield f"tokenizer   {data.tokenizer}: {tokenizer[:12]}…"
    if not data.train_sources:
        yield "data        data.train is not set: a run needs it, or data.sources"
    training = []
    for source in data.train_sources:
        missing = _missing(source.path)
        if missing:
            yield f"data        {source.name}: {missing}: not checked"
        else:
            training.append(Source(source.name, source.path, source.weight))
    if training:
        yield from _opened(config, training, tokenizer)
    if data.validation is not None and config.training.validation_batches > 0:
        missing = _missing(data.validation)
        if missing:
            yield f"data        validation: {missing}: not checked"
        else:
            yield from _opened(config, [Source("validation", data.validation)], tokenizer)


def _missing(dataset: str) -> str:
    """Why a dataset cannot be opened from here; empty where it can."""
    storage = open_storage(dataset)
    if "://" not in dataset and Path(dataset).exists():
        return ""
    try:
        there = storage.sizes([MANIFEST_FILE]) != [None]
    except OSError as error:
        return f"{storage.url} cannot be reached ({error.strerror or error})"
    return "" if there else f"{storage.url} is not here (it has no {MANIFEST_FILE})"


def _opened(config: RunConfig, sources: list[Source], tokenizer: str | None) -> Iterator[str]:
    """Open them as a run does, but for the sums of whole shards. Raises UserError."""
    data, training = config.data, [source.name for source in sources] == [s.name for s in config.data.train_sources]
    loader = RowLoader(
        sources if any(source.weight for source in sources) else [replace(source, weight=1.0) for source in sources],
        sequence_length=data.sequence_length,
        packing=data.packing,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        shuffle=data.shuffle,
        data_parallel_rank=0,
        data_parallel_size=1,
        weight_changes=data.weight_changes_by_row if training else (),
        shuffle_window_records=data.shuffle_window_records,
        vocab_size=config.model.vocab_size,
        tokenizer_sha256=tokenizer,
        verify="never",
    )
    try:
        for name, manifest in loader.manifests.items():
            yield f"data        {name}: {manifest.tokens:,} tokens in {manifest.documents:,} documents"
    finally:
        loader.close()
