"""Adopt WebDataset tars that others wrote, without copying them.

    nextlat-data index tars/ --tokenizer tokenizer.model                                  text in .txt members
    nextlat-data index tars/ --tokenizer tokenizer.model --text-field text                a field of .json members
    nextlat-data index "tars/{000..099}.tar" --tokenizer tokenizer.model --token-member npy --output data

One record is one document. The tars stay where they are: an output directory elsewhere gets symbolic links. Run again,
it reads only tars whose size or time of change differs, or whose index is missing or damaged; an
interrupted run resumes after its last finished tar.

Invariant: the manifest is written last and vouches for every index below it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.shards.journal import Journal, writing_to
from data_tools.shards.shard_report import merged
from data_tools.tars.adopt import AdoptedTar, Adopter
from nextlat_dist.data.shard_format import (
    MANIFEST_FILE,
    Manifest,
    MembersEntry,
    TokenizerEntry,
    index_name,
    manifest_bytes,
    read_manifest,
)
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import TOKENIZER_FILE, sole_writer, write_whole
from nextlat_dist.reporting.console import say

JOURNAL_FILE = ".index-journal.jsonl"


@dataclass(frozen=True)
class Tars:
    """The tars to adopt: `names` in `storage`; indices and manifest go to `output`."""

    storage: Storage
    names: list[str]
    output: Path


def find_tars(inputs: Sequence[str], output: Path | None) -> Tars:
    """The tars that the inputs name: folders, files, URLs, the last two also with `{000..099}`.

    Raises:
        UserError: there are none, they cannot be found, or it is not clear where to write.
    """
    # Comes with webdataset, whose users write shards so.
    from braceexpand import braceexpand

    expanded = [name for given in inputs for name in braceexpand(given)]
    remote = [name for name in expanded if "://" in name]
    if remote and len(remote) < len(expanded):
        raise UserError(f"{remote[0]} is remote and other tars are local; index them apart, into two datasets")
    if ":/" in str(output):
        raise UserError(f"--output {output} is remote; write to a local folder and copy the files from there")
    return _remote_tars(remote, output) if remote else _local_tars(expanded, output)


def _remote_tars(urls: list[str], output: Path | None) -> Tars:
    bad = [url for url in urls if "?" in url or "@" in url]
    if bad:
        raise UserError(
            f"{bad[0].partition('?')[0].rpartition('@')[2]} is given with a password or a query, which the manifest "
            "would hold for all to see; give the plain URL and the access through the environment"
        )
    bad = [url for url in urls if not url.endswith(".tar")]
    if bad:
        raise UserError(f"{bad[0]} is not the URL of a .tar; name the tars, as in URL/{{000..099}}.tar")
    if output is None:
        raise UserError(f"{urls[0]} is remote; name a local folder for the indices and the manifest with --output")
    return Tars(open_storage(output), urls, output)


def _local_tars(inputs: list[str], output: Path | None) -> Tars:
    files: list[Path] = []
    for given in inputs:
        path = Path(os.path.abspath(given))
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise UserError(f"{given} {'holds no .tar' if path.is_dir() else 'does not exist'}; name folders or tars")
        files += [file for file in found if file not in files]
    base = Path(os.path.commonpath([file.parent for file in files]))
    if output is None:
        if any(file.parent != base for file in files):
            raise UserError("the tars lie in several folders; name one for their indices and manifest with --output")
        output = base
    output = Path(os.path.abspath(output))
    with writing_to(output):
        names = [
            file.relative_to(output) if file.is_relative_to(output) else _link(file, output, file.relative_to(base))
            for file in files
        ]
    return Tars(open_storage(output), [name.as_posix() for name in names], output)


def _link(file: Path, output: Path, name: Path) -> Path:
    """Make `output/name` a symbolic link to the tar."""
    link = output / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()  # of an earlier run
    if link.exists():
        raise UserError(f"{link} exists and is no link to {file}; pass another --output")
    link.symlink_to(file)
    return name


def index(tars: Tars, tokenizer: Tokenizer, members: MembersEntry, *, split: str, bos: bool, eos: bool) -> Manifest:
    """Write the indices that are not up to date, the tokenizer and the manifest.

    Raises:
        UserError: a tar cannot be adopted, or the output holds another kind of dataset.
    """
    for name, token in (("bos", tokenizer.bos_id if bos else 0), ("eos", tokenizer.eos_id if eos else 0)):
        if token < 0:
            raise UserError(f"the tokenizer has no {name.upper()} token; pass --no-{name} or use another tokenizer")
    entry = TokenizerEntry(
        TOKENIZER_FILE,
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    template = Manifest(split, entry, (), False, bos, eos, {}, members)
    with writing_to(tars.output):
        tars.output.mkdir(parents=True, exist_ok=True)
    with sole_writer(tars.output):
        return _index(tars, tokenizer.model, template)


def _index(tars: Tars, model: bytes, template: Manifest) -> Manifest:
    sizes: dict[str, int] = {}
    for name, size in zip(tars.names, tars.storage.sizes(tars.names), strict=True):
        if size is None:
            raise UserError(f"tar {tars.storage.full_name(name)} does not exist; correct its name")
        sizes[name] = size
    adopted = _Adopted(tars.output, template)
    known = adopted.known
    for name in [name for name, tar in known.items() if name not in sizes or not _current(tar, tars)]:
        del known[name]
    stale = [name for name in tars.names if name not in known]
    if known:
        say(f"{len(known)} of {len(tars.names)} tars are indexed already", error=True)
    adopt = Adopter(template, model)
    total = sum(sizes[name] for name in stale)
    with tqdm(total=total, unit="B", unit_scale=True, desc="index", file=sys.stderr, mininterval=0.5) as bar:
        for name in stale:
            tar, table = adopt(tars.storage, name, sizes[name], bar.update)
            with writing_to(tars.output):
                write_whole(tars.output / index_name(name), table)
                adopted.add(tar)
    manifest = replace(
        template, shards=tuple(known[name].entry for name in tars.names), report=_report([*map(known.get, tars.names)])
    )
    if not manifest.documents:
        there = manifest.report["ignored_members"]
        raise UserError(
            f"the {len(sizes)} tars hold no document in members .{template.members.member}, only "
            f"{', '.join(f'{count:,} {name}' for name, count in there.items()) or 'empty ones'}; name another "
            "member with --text-member or --token-member"
        )
    with writing_to(tars.output):
        write_whole(tars.output / TOKENIZER_FILE, model)
        write_whole(tars.output / MANIFEST_FILE, manifest_bytes(manifest))
        adopted.finish()
    return manifest


def _current(tar: AdoptedTar, tars: Tars) -> bool:
    """Whether the tar and its index are those of an earlier run."""
    path = tars.output / index_name(tar.entry.name)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != tar.entry.index_sha256:
        return False
    return tars.storage.stamp(tar.entry.name) == tar.stamp


def _report(tars: list[Any]) -> dict[str, Any]:
    ignored: Counter[str] = Counter()
    for tar in tars:
        ignored.update(tar.ignored)
    nothing = {"count": 0, "names": []}
    return {
        "on_invalid": "fail",
        "empty": merged([tar.empty for tar in tars]),
        "binary": nothing,
        "invalid_utf8": nothing,
        "not_lossless": merged([tar.not_lossless for tar in tars]),
        "without": merged([tar.without for tar in tars]),
        "ignored_members": dict(ignored),
        "tars": [tar.to_json() for tar in tars],
    }


class _Adopted:
    """The tars that earlier runs with the same settings finished: those of the manifest and those of the journal.

    Raises:
        UserError: the directory holds another kind of dataset.
    """

    def __init__(self, output: Path, template: Manifest) -> None:
        self._journal = Journal(output / JOURNAL_FILE, {**asdict(template), "shards": [], "report": {}})
        self.known: dict[str, AdoptedTar] = {}
        if (output / MANIFEST_FILE).exists():
            manifest = read_manifest(output)
            if manifest.members.kind == "block":
                raise UserError(f"{output} holds a dataset of its own, not adopted tars; pass another --output")
            if asdict(replace(manifest, shards=(), report={})) == asdict(template):
                self._take(manifest.report["tars"])
        if self._journal.before and self._journal.before[0] == self._journal.settings:
            self._take(self._journal.before[1:])
        self._begun = False

    def _take(self, tars: list[dict[str, Any]]) -> None:
        self.known |= {tar["entry"]["name"]: AdoptedTar.from_json(tar) for tar in tars}

    def add(self, tar: AdoptedTar) -> None:
        """Make it durable that this tar is finished."""
        self.known[tar.entry.name] = tar
        if self._begun:
            self._journal.add(tar.to_json())
        else:
            self._journal.keep([known.to_json() for known in self.known.values()])
            self._begun = True

    def finish(self) -> None:
        """The manifest is written."""
        self._journal.remove()
