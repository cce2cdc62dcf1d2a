"""Documents of a dataset of the Hugging Face hub or of anything else that `datasets` opens, streamed.

    nextlat-data shard --source hf:HuggingFaceFW/fineweb-edu --hf-config sample-10BT --tokenizer t.model --output data

Invariant: each data file is a part, read on its own and in the dataset's order, so names and order depend on nothing
but the dataset; the data files' versions are in `identity`, so that a dataset that changed is not taken for the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from data_tools.text.json_lines import Fields, text_bytes
from data_tools.text.sources import TextDocument
from nextlat_dist.data.order import permutation
from nextlat_dist.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

SCHEME = "hf:"
BATCH_ROWS = 256  # several times as fast as row by row


class HfSource:
    """A split of a dataset.

    Args:
        name: of the hub, a local folder, or a format such as `parquet` or `json` with `data_files`.
        config: of the dataset, for those that have several.
        data_files: patterns of files to take instead of all.

    Raises:
        UserError: `datasets` is not installed, or there is no such dataset, or it cannot be reached, or has no such
            split or field.
    """

    def __init__(self, name: str, fields: Fields, *, config: str | None, split: str, data_files: Sequence[str]) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"--source {SCHEME}{name} needs the `datasets` package; install it with pip install 'nextlat-dist[hf]'"
            ) from None
        if name == "pandas":
            raise UserError(
                f"--source {SCHEME}{name} would unpickle its files, which runs code in them; write them as Parquet and "
                f"use {SCHEME}parquet"
            )
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors come as exceptions too
        self._name = name
        self._fields = fields
        self._seed: int | None = None
        with self._opening():
            builder = datasets.load_dataset_builder(name, config, data_files=list(data_files) or None)
            self._dataset: IterableDataset = builder.as_streaming_dataset(split=split)
            self._dataset = self._with_fields(self._dataset)
        files = (builder.config.data_files or {}).get(split)
        self._identity = {
            "--source": f"{SCHEME}{name}",
            "--hf-config": config,
            "--hf-split": split,
            "files of the dataset": {
                "config": builder.config_id,
                "files": list(files or []),
                "versions": list(files.origin_metadata) if files else [],
            },
            **fields.identity,
        }

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Whatever `datasets` raises, in one sentence: it has no exception of its own for most of it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"{SCHEME}{self._name} cannot be read ({reason}); check --source, --hf-config, --hf-split, "
                "--hf-data-files and the network, then run the same command again"
            ) from error

    def _with_fields(self, dataset: IterableDataset) -> IterableDataset:
        """Only the columns that are read."""
        columns = dataset.column_names
        if columns is None:  # the dataset does not say before its first row
            columns = list(next(iter(dataset), {}))
        missing = [field for field in self._fields.names if field not in columns]
        if missing:
            raise UserError(
                f"{SCHEME}{self._name} has no column {missing[0]!r}, only {', '.join(columns)}; "
                "name the columns with --field, --prompt-field, --split-field"
            )
        return dataset.select_columns(self._fields.names)

    @property
    def parts(self) -> int:
        """Data files, as `datasets` shards them."""
        return int(self._dataset.num_shards)

    @property
    def total_bytes(self) -> None:
        """Not known: what is read is not what the files hold."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """Name, options and data files with their versions (on the hub, a commit)."""
        return self._identity

    def documents(self, first_part: int = 0) -> Iterator[TextDocument]:
        """The documents from that data file on.

        Raises:
            UserError: the dataset cannot be read, or a field is no text.
        """
        order = range(self.parts) if self._seed is None else permutation(self.parts, self._seed).tolist()
        for part in range(first_part, self.parts):
            rows = self._dataset.shard(num_shards=self.parts, index=order[part], contiguous=True)
            batches = iter(rows.iter(batch_size=BATCH_ROWS))
            number = 0
            while True:
                with self._opening():
                    batch = next(batches, None)
                if batch is None:
                    break
                for row in zip(*(batch[name] for name in self._fields.names), strict=True):
                    number += 1
                    yield self._document(dict(zip(self._fields.names, row, strict=True)), order[part], number, part)

    def shuffled(self, seed: int) -> HfSource:
        """The data files in another order."""
        other = copy(self)
        other._seed = seed
        return other

    def _document(self, row: Mapping[str, Any], file: int, number: int, part: int) -> TextDocument:
        values: dict[str, str] = {}
        for name in self._fields.names:
            value = row[name]
            if not isinstance(value, str | None):
                raise UserError(
                    f"column {name!r} of {SCHEME}{self._name} holds a {type(value).__name__}; it must be a string"
                )
            values[name] = value or ""
        text = text_bytes(values[self._fields.text])
        prompt = None if self._fields.prompt is None else text_bytes(values[self._fields.prompt])
        split = None if self._fields.split is None else values[self._fields.split]
        size = len(text) + len(prompt or b"")
        short_name = self._name.rstrip("/").rpartition("/")[2]
        return TextDocument(f"{short_name}/{file}:{number}", text, prompt, split, size, part=part)
