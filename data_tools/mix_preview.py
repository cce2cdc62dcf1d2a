"""`nextlat-data mix-preview`: what a weighted mixture of datasets will do, before a run is started.

    nextlat-data mix-preview --source web=data/web:0.8 --source code=s3://bucket/code:0.2 --tokens 10_000_000_000
    nextlat-data mix-preview --config run.yaml --png mix.png

For the tokens of a run: the share of each source and its target at several points, the largest deviation at any row,
how many epochs of each source that takes, and where a source first repeats. Only manifests are read.

Invariant: the rows are counted with the mixture that training uses, row by row; nothing is estimated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nextlat_dist.config.load import load_config
from nextlat_dist.config.schema import DataConfig, SourceConfig
from nextlat_dist.data.mixture import Mixture
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.files import write_whole
from nextlat_dist.reporting.console import say

CHUNK_ROWS = 1 << 15
MOST_ROWS = 1_000_000_000
CURVE_POINTS = 200
TABLE_FRACTIONS = (1e-4, 1e-3, 1e-2, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Preview:
    """A mixture over a run of `rows` rows. Sources are numbered as in `names`.

    Attributes:
        row_tokens: tokens of training per row (sequence_length).
        rows_per_epoch: float [sources], rows that one pass over each source gives.
        points: int64 [points], numbers of rows, increasing, the last one `rows`.
        taken: int64 [points, sources], rows of each source among these.
        due: float64 [points, sources], what the weights ask for.
        deviation: float64 [sources], largest |taken - due| in rows after any row.
        first_repeat: first row that repeats something of each source, None where none does.
    """

    names: tuple[str, ...]
    rows: int
    row_tokens: int
    rows_per_epoch: np.ndarray
    points: np.ndarray
    taken: np.ndarray
    due: np.ndarray
    deviation: np.ndarray
    first_repeat: list[int | None]

    @property
    def epochs(self) -> np.ndarray:
        """float64 [points, sources]: passes over each source."""
        epochs: np.ndarray = self.taken / self.rows_per_epoch
        return epochs

    def table_points(self) -> list[int]:
        """Indices into `points` of those that are worth a line."""
        wanted = [max(round(fraction * self.rows), 1) for fraction in TABLE_FRACTIONS]
        return sorted({int(np.searchsorted(self.points, row)) for row in wanted})


def preview(
    mixture: Mixture, changes: Sequence[int], rows: int, row_tokens: int, rows_per_epoch: Mapping[str, float]
) -> Preview:
    """Take `rows` rows of the mixture and count.

    Args:
        changes: rows at which its weights change.
        row_tokens: tokens of training per row.
        rows_per_epoch: of each source, by name.
    """
    names = mixture.names
    per_epoch = np.array([rows_per_epoch[name] for name in names], dtype=np.float64)
    steps = np.linspace(1, rows, min(CURVE_POINTS, rows))
    wanted = [max(round(fraction * rows), 1) for fraction in TABLE_FRACTIONS]
    points = np.unique(np.concatenate([steps.astype(np.int64), np.array(wanted, np.int64)]))
    taken = np.zeros((len(points), len(names)), np.int64)
    due = np.zeros((len(points), len(names)))
    deviation = np.zeros(len(names))
    first_repeat: list[int | None] = [None] * len(names)
    for first, counts, target in _walk(mixture, changes, rows):
        deviation = np.maximum(deviation, np.abs(counts - target).max(axis=0))
        here = (points > first) & (points <= first + len(counts))
        taken[here] = counts[points[here] - first - 1]
        due[here] = target[points[here] - first - 1]
        for source, whole in enumerate(np.floor(per_epoch)):
            if first_repeat[source] is None and counts[-1, source] > whole:
                first_repeat[source] = first + int(np.searchsorted(counts[:, source], whole, side="right"))
    return Preview(names, rows, row_tokens, per_epoch, points, taken, due, deviation, first_repeat)


def _walk(mixture: Mixture, changes: Sequence[int], rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(rows before, rows taken of each source after each of the next rows, rows due then): int64 and float64
    [rows, sources]."""
    state = mixture.start()
    sources = np.arange(len(mixture.names))
    borders = sorted({row for row in changes if row < rows} | {*range(0, rows, CHUNK_ROWS), rows})
    with tqdm(total=rows, desc="mix-preview", unit=" rows", unit_scale=True, file=sys.stderr, mininterval=0.5) as bar:
        for first, end in itertools.pairwise(borders):
            before = np.array(state.taken)
            chosen = state.take(end - first)
            counts = before + np.cumsum(chosen[:, None] == sources, axis=0)
            steps = np.arange(1, len(chosen) + 1)[:, None]
            yield first, counts, np.array(mixture.target(first)) + steps * np.array(mixture.shares(first))
            bar.update(len(chosen))


def open_preview(data: DataConfig, tokens: int) -> Preview:
    """The preview of a run of `tokens` tokens with these settings.

    Raises:
        UserError: a dataset is missing, too small, or of another tokenizer than the first; bad weights.
    """
    if data.sequence_length < 1:
        raise UserError(f"--sequence-length is {data.sequence_length}; it must be at least 1")
    rows = tokens // data.sequence_length
    if rows < 1:
        raise UserError(f"--tokens {tokens} is less than one row of {data.sequence_length} tokens; give more")
    if rows > MOST_ROWS:
        raise UserError(
            f"--tokens {tokens} is {rows} rows of {data.sequence_length} tokens, counted one by one; give at most "
            f"{MOST_ROWS:,} rows"
        )
    sources = data.train_sources
    if len({source.name for source in sources}) < len(sources):
        raise UserError(f"the sources are named {', '.join(source.name for source in sources)}; give each its own name")
    mixture = Mixture({source.name: source.weight for source in sources}, data.weight_changes_by_row)
    rows_per_epoch: dict[str, float] = {}
    tokenizer = None
    for source in sources:
        manifest = read_manifest(open_storage(source.path))
        tokenizer = tokenizer or manifest.tokenizer.sha256
        if manifest.tokenizer.sha256 != tokenizer:
            raise UserError(
                f"{source.path} was made with tokenizer {manifest.tokenizer.sha256[:12]}…, {sources[0].path} with "
                f"{tokenizer[:12]}…; sources of one mixture need the same tokenizer"
            )
        whole = manifest.tokens / (data.sequence_length + 1)
        rows_per_epoch[source.name] = whole if data.packing == "concat" else manifest.documents
        if rows_per_epoch[source.name] < 1:
            raise UserError(
                f"{source.path} has {manifest.tokens} tokens, too few for one row of {data.sequence_length + 1}; use "
                "more data, or a smaller --sequence-length or data.sequence_length"
            )
    changes = [row for row, _ in data.weight_changes_by_row]
    return preview(mixture, changes, rows, data.sequence_length, rows_per_epoch)


def table(found: Preview) -> str:
    """Shares and targets at several points, then what becomes of each source."""
    width = max(17, *(len(name) for name in found.names))
    lines = ["tokens".rjust(18) + "".join(name.rjust(width + 2) for name in found.names)]
    for point in found.table_points():
        row = int(found.points[point])
        cells = (
            f"{taken / row:.2%} / {due / row:.2%}"
            for taken, due in zip(found.taken[point], found.due[point], strict=True)
        )
        lines.append(f"{row * found.row_tokens:>18,}" + "".join(cell.rjust(width + 2) for cell in cells))
    lines += ["(share / target)", ""]
    for source, name in enumerate(found.names):
        repeat = found.first_repeat[source]
        epochs = found.epochs[-1, source]
        when = "never repeats" if repeat is None else f"repeats from token {repeat * found.row_tokens:,} on"
        lines.append(
            f"{name}: {found.taken[-1, source]:,} rows, {epochs:,.2f} epochs, {when}; at most "
            f"{found.deviation[source]:.2f} rows from its target"
        )
    return "\n".join(lines)


def to_json(found: Preview) -> dict[str, Any]:
    """All of the preview at the points of the table."""
    final = len(found.points) - 1
    sources = [
        {
            "name": name,
            "rows": int(found.taken[final, source]),
            "share": found.taken[final, source] / found.rows,
            "target_share": found.due[final, source] / found.rows,
            "largest_deviation_rows": float(found.deviation[source]),
            "rows_per_epoch": float(found.rows_per_epoch[source]),
            "epochs": float(found.epochs[final, source]),
            "first_repeat_tokens": None
            if found.first_repeat[source] is None
            else int(found.first_repeat[source] or 0) * found.row_tokens,
        }
        for source, name in enumerate(found.names)
    ]
    prefixes = [
        {
            "rows": int(found.points[point]),
            "tokens": int(found.points[point]) * found.row_tokens,
            "share": dict(zip(found.names, (found.taken[point] / found.points[point]).tolist(), strict=True)),
            "target_share": dict(zip(found.names, (found.due[point] / found.points[point]).tolist(), strict=True)),
            "epochs": dict(zip(found.names, found.epochs[point].tolist(), strict=True)),
        }
        for point in found.table_points()
    ]
    return {
        "rows": found.rows,
        "tokens": found.rows * found.row_tokens,
        "sequence_length": found.row_tokens,
        "largest_deviation_rows": float(found.deviation.max()),
        "sources": sources,
        "prefixes": prefixes,
    }


def draw(found: Preview, path: Path) -> None:
    """PNG: share of each source since the beginning, and epochs of it, over tokens."""
    from matplotlib.figure import Figure

    from nextlat_dist.reporting.pictures import save_picture

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = found.points * found.row_tokens
    for source, name in enumerate(found.names):
        (line,) = left.plot(tokens, 100 * found.taken[:, source] / found.points, label=name)
        left.plot(tokens, 100 * found.due[:, source] / found.points, ":", color="black", linewidth=1)
        right.plot(tokens, found.epochs[:, source], color=line.get_color(), label=name)
    right.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="tokens", ylabel="share so far (%)", title="Share (dotted: target)", ylim=(0, 100))
    right.set(xlabel="tokens", ylabel="epochs", title="Passes over each source", ylim=(0, None))
    left.legend()
    right.legend()
    save_picture(figure, path)


def parse_source(text: str) -> SourceConfig:
    """`NAME=DIR:WEIGHT`; the directory may be a URL. Raises UserError for anything else."""
    name, _, rest = text.partition("=")
    path, _, weight = rest.rpartition(":")
    try:
        parsed = float(weight)
    except ValueError:
        parsed = -1.0
    if not name or not path or not 0 <= parsed < float("inf"):
        raise UserError(
            f"--source {text} is not NAME=DIR:WEIGHT with a weight that is not negative, as in web=data:0.8"
        )
    return SourceConfig(name, path, parsed)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("mix-preview", help="what a weighted mixture of datasets will do")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--source", action="append", metavar="NAME=DIR:WEIGHT", help="once for each dataset")
    given.add_argument("--config", type=Path, metavar="FILE", help="of a run: its sources, weights and their changes")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the run (default: the config's)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="(default: the config's)")
    parser.add_argument("--packing", choices=("concat", "pad"), help="(default: the config's)")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw shares and epochs over tokens (default: nowhere)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed (default: nowhere)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    tokens = options.tokens
    if options.config is not None:
        config = load_config(options.config)
        data = config.data
        tokens = config.training.train_tokens if tokens is None else tokens
        if not data.train_sources:
            raise UserError(f"{options.config} names no training data; set data.sources in it")
    else:
        data = DataConfig(sources=[parse_source(source) for source in options.source])
        if tokens is None:
            raise UserError("--tokens is missing; say how many tokens the run takes")
    if options.sequence_length is not None:
        data = replace(data, sequence_length=options.sequence_length)
    if options.packing is not None:
        data = replace(data, packing=options.packing)
    found = open_preview(data, tokens)
    say(table(found))
    if options.png is not None:
        draw(found, options.png)
    if options.json is not None:
        write_whole(options.json, (json.dumps(to_json(found), indent=1) + "\n").encode())
