"""The shard format: what `nextlat-data shard` writes and `nextlat_dist.data.loader` reads.

    dataset/manifest.json              shards, hashes, tokenizer, report; written last, so a dataset without one is
                                       unfinished
    dataset/tokenizer.model            a copy of the sentencepiece model that made the tokens
    dataset/train-000000.tar           WebDataset shard; one record is a block of whole consecutive documents
    dataset/train-000000.index.npy     byte range, counts and crc32 of every record: int64 [records, 5]

A record has the members `tokens.npy` (uint16 or uint32), `ends.npy` (int64, exclusive end of each document in tokens)
and optionally `prompts.npy` (int64, leading tokens of each document that are never predicted, BOS included) and
`labels.npy` (as tokens.npy: what is predicted in each token's storage, where that is not the token itself). Further
members, such as the exact beliefs of a synthetic process, are covered by the checksums and left unread. A document is
never split over two records and holds at least one token. Tars that others wrote can be adopted by `nextlat-data
index`: their manifest says which member holds the tokens or the text of a record's one document.

Invariant: the manifest carries its own digest and the hash of every index, an index carries the crc32 of every record,
so no byte below a manifest can change without being noticed. Imports neither torch nor webdataset.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nextlat_dist.data.json_values import MAX_COUNT, check_file_name, check_report, checked, shown, typed
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.data.storage.local import LocalStorage
from nextlat_dist.errors import UserError

FORMAT = "nextlat_dist.dataset"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
# The most that is read, whatever a server sends: 268 MB are about a million shards of some 260 bytes each; an index of
# 4.3 GB has 107 million records of five int64, and numpy's header of one is far below 4 KB.
MANIFEST_BYTES = 1 << 28
INDEX_HEADER_BYTES, INDEX_BYTES = 1 << 12, 1 << 32
INDEX_COLUMNS = ("offset", "length", "documents", "tokens", "crc32")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest stored type that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(shard: str) -> str:
    """Index of a shard, relative to the dataset; a shard with a full path or URL has it in the dataset's directory."""
    if "://" in shard or shard.startswith("/"):
        name = shard.rpartition("/")[2].removesuffix(".tar")
        return f"{name}-{hashlib.sha256(shard.encode()).hexdigest()[:8]}.index.npy"
    return shard.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class Record:
    """A block of whole documents.

    Attributes:
        tokens: uint16 or uint32 [tokens].
        ends: int64 [documents], cumulative and exclusive; strictly increasing, the last one is `len(tokens)`.
        prompts: int64 [documents] or None; leading tokens of each document that are never a training target.
        labels: as tokens, or None; what the state before a token is trained to predict instead of it.
    """

    tokens: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when the arrays do not describe a block of documents."""
        if self.tokens.ndim != 1 or self.tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"tokens are {self.tokens.dtype} {self.tokens.shape}, not one row of uint16 or uint32")
        if self.ends.ndim != 1 or self.ends.dtype != np.int64 or not len(self.ends) or self.lengths.min() < 1:
            raise ValueError("document ends are not strictly increasing int64")
        if self.ends[-1] != len(self.tokens):
            raise ValueError(f"documents end at token {self.ends[-1]}, but there are {len(self.tokens)} tokens")
        if self.prompts is not None and (
            self.prompts.shape != self.ends.shape
            or self.prompts.dtype != np.int64
            or self.prompts.min() < 0
            or (self.prompts > self.lengths).any()
        ):
            raise ValueError("prompt lengths are not int64 between 0 and the length of their document")
        if self.labels is not None and (
            self.labels.shape != self.tokens.shape or self.labels.dtype != self.tokens.dtype
        ):
            raise ValueError(
                f"labels are {self.labels.dtype} {self.labels.shape}, tokens {self.tokens.dtype} {self.tokens.shape}"
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document."""
        lengths = self.ends.copy()
        lengths[1:] -= self.ends[:-1]
        return lengths

    def members(self) -> dict[str, bytes]:
        """The record as WebDataset members; the same arrays always give the same bytes."""
        arrays = {
            "tokens.npy": self.tokens,
            "ends.npy": self.ends,
            "prompts.npy": self.prompts,
            "labels.npy": self.labels,
        }
        return {name: _npy_bytes(array) for name, array in arrays.items() if array is not None}

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> Record:
        """Inverse of `members`. Raises ValueError for anything else than such a record; never unpickles."""
        missing = {"tokens.npy", "ends.npy"} - set(members)
        if missing:
            raise ValueError(f"the record has no {' and no '.join(sorted(missing))}")
        arrays = [npy_array(members[name]) if name in members else None for name in ("prompts.npy", "labels.npy")]
        return cls(npy_array(members["tokens.npy"]), npy_array(members["ends.npy"]), *arrays)


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


# What `numpy.save` writes for whole numbers in one row or one table. `numpy.load` parses the header as Python, which is
# ten times slower and, with Python 3.11, fails at random when several threads do it.
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \((\d+),(?: (\d+))?\), \} *\n"
)


def npy_array(data: bytes) -> np.ndarray:
    """The array of a .npy file, read-only. Raises ValueError for anything but whole numbers in one row or table."""
    begin = len(_NPY_MAGIC) + 2
    header = _NPY_HEADER.fullmatch(data, begin, begin + int.from_bytes(data[begin - 2 : begin], "little"))
    if not data.startswith(_NPY_MAGIC) or header is None:
        raise ValueError("a member is no .npy file of whole numbers in one row")
    shape = [int(size) for size in header.groups()[1:] if size is not None]
    if max(shape, default=0) > len(data):
        raise ValueError(f"a member says that it has the shape {shape}, but has {len(data)} bytes")
    return np.frombuffer(data, header[1].decode(), offset=header.end()).reshape(shape)


@dataclass(frozen=True)
class IndexEntry:
    """One record: its byte range in the tar (headers and padding too; of an adopted tar only the member that is read),
    its counts, and the crc32 of that range."""

    offset: int
    length: int
    documents: int
    tokens: int
    crc32: int


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it; `name` is relative to the dataset directory, or a full path or URL."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    records: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the shards; `file` is relative to the dataset directory, absent ids are -1."""

    file: str
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class MembersEntry:
    """Where a record has its documents: `block` is what `nextlat-data shard` writes; a record of an adopted tar is one
    document, of `tokens` or of `text`.

    Attributes:
        member: extension of the member that holds the tokens or the text.
        field: of a text member that is JSON, None for plain text.
    """

    kind: Literal["block", "tokens", "text"] = "block"
    member: str = "tokens.npy"
    field: str | None = None


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `bos` and `eos` say whether each document starts and ends with that token."""

    split: str
    tokenizer: TokenizerEntry
    shards: tuple[ShardEntry, ...]
    has_prompts: bool
    bos: bool
    eos: bool
    report: dict[str, Any]
    members: MembersEntry = MembersEntry()

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "totals": {"records": self.records, "documents": self.documents, "tokens": self.tokens},
        }
        return {**body, "digest": _digest(body)}

    @property
    def digest(self) -> str:
        """sha256 of the whole content: two datasets with equal digests are equal to the byte."""
        return str(self.to_json()["digest"])


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.to_json(), indent=1) + "\n").encode()


def read_manifest(dataset: Path | Storage) -> Manifest:
    """Read and check `manifest.json` of a dataset.

    Raises:
        UserError: there is none, it belongs to something else or to another format version, or it was edited.
    """
    storage = LocalStorage(dataset) if isinstance(dataset, Path) else dataset
    path = storage.full_name(MANIFEST_FILE)
    try:
        raw = json.loads(storage.read(MANIFEST_FILE, MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        splits = ("train", "validation", "test")
        inside = [split for split in splits if storage.sizes([f"{split}/{MANIFEST_FILE}"]) != [None]]
        hint = f"name one of its splits ({', '.join(inside)})" if inside else "write one with `nextlat-data shard`"
        raise UserError(f"{storage.url} is not a finished dataset: it has no {MANIFEST_FILE}; {hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); correct the dataset's address or try again") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a dataset manifest: it is not JSON; shard the data again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest written by `nextlat-data shard` (no format: {FORMAT!r})")
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {shown(raw.get('format_version'))}, this release reads {FORMAT_VERSION}; "
            "shard the data again"
        )
    digest = raw.pop("digest", None)
    if digest != _digest(raw):
        raise UserError(
            f"{path} was changed after it was written: its content no longer matches its digest; shard the data again"
        )
    try:
        return _checked_manifest(raw)
    except ValueError as error:
        raise UserError(f"{path} is not a manifest that can be used: {error}; shard the data again") from None


def _checked_manifest(raw: Mapping[str, Any]) -> Manifest:
    """The manifest of a JSON object. Raises ValueError when a value is not what `nextlat-data` writes there."""
    for name, kind in {"split": str, "has_prompts": bool, "bos": bool, "eos": bool, "report": dict}.items():
        checked(raw.get(name), kind, name)
    check_report(raw["report"])
    members = typed(MembersEntry, raw.get("members"), "members")
    tokenizer = typed(TokenizerEntry, raw.get("tokenizer"), "tokenizer")
    check_file_name(tokenizer.file, "tokenizer.file", anywhere=False)
    if tokenizer.vocab_size < 1:
        raise ValueError(f"tokenizer.vocab_size is {tokenizer.vocab_size}, not at least 1")
    for name in ("bos_id", "eos_id", "pad_id"):
        if getattr(tokenizer, name) >= tokenizer.vocab_size:
            raise ValueError(f"tokenizer.{name} is {getattr(tokenizer, name)}, not below {tokenizer.vocab_size}")
    for name in ("bos", "eos"):
        if members.kind != "block" and raw[name] and getattr(tokenizer, f"{name}_id") < 0:
            raise ValueError(f"{name} is true, but the tokenizer has no such token")
    # `nextlat-data index` lists the tars that it adopted, wherever they lie; a dataset of `shard` has its own.
    adopted = {tar["entry"]["name"] for tar in raw["report"].get("tars", [])} if members.kind != "block" else set()
    shards = []
    for number, entry in enumerate(checked(raw.get("shards"), list, "shards")):
        shard = typed(ShardEntry, entry, f"shards[{number}]")
        check_file_name(shard.name, f"shards[{number}].name", anywhere=shard.name in adopted)
        for name in ("bytes", "records", "documents", "tokens"):
            if getattr(shard, name) < 0:
                raise ValueError(f"shards[{number}].{name} is {getattr(shard, name)}, not a count")
        shards.append(shard)
    if sum(shard.tokens + shard.bytes for shard in shards) > MAX_COUNT:
        raise ValueError("its shards hold more tokens or bytes than can be counted")
    return Manifest(
        split=raw["split"],
        tokenizer=tokenizer,
        shards=tuple(shards),
        has_prompts=raw["has_prompts"],
        bos=raw["bos"],
        eos=raw["eos"],
        report=raw["report"],
        members=members,
    )


def index_bytes(entries: Sequence[IndexEntry]) -> bytes:
    """The sidecar of one shard: int64 [records, 5], columns as `INDEX_COLUMNS`."""
    table = np.array([[getattr(entry, column) for column in INDEX_COLUMNS] for entry in entries], dtype=np.int64)
    return _npy_bytes(table.reshape(-1, len(INDEX_COLUMNS)))


def read_index(storage: Storage, shard: ShardEntry) -> np.ndarray:
    """int64 [records, 5]: offset, length, documents, tokens and crc32 of the records of a shard, in file order.

    Raises:
        UserError: the index is missing or is not the one the manifest was written with.
    """
    name = index_name(shard.name)
    try:
        data = storage.read(name, min(shard.records * 8 * len(INDEX_COLUMNS) + INDEX_HEADER_BYTES, INDEX_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"index {storage.full_name(name)} of shard {shard.name} is missing; copy it or write it again with "
            "`nextlat-data index` or `shard`"
        ) from None
    except OSError as error:
        raise UserError(f"index {storage.full_name(name)} cannot be read ({error}); try again") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(
            f"index {storage.full_name(name)} does not match {MANIFEST_FILE}: expected sha256 "
            f"{shard.index_sha256[:12]}…; copy the dataset again or write its index again"
        )
    try:
        table = npy_array(data)
        _check_index(table, shard)
    except ValueError as error:
        raise UserError(
            f"index {storage.full_name(name)} is not one that `nextlat-data` writes: {error}; shard the data again"
        ) from None
    return table


def _check_index(table: np.ndarray, shard: ShardEntry) -> None:
    """Raises ValueError unless the table describes records of this shard."""
    if table.dtype != np.int64 or table.shape != (shard.records, len(INDEX_COLUMNS)):
        raise ValueError(
            f"it is a table of {table.dtype} {list(table.shape)} where the manifest has {shard.records} records, so "
            f"int64 [{shard.records}, {len(INDEX_COLUMNS)}]"
        )
    offset, length, documents, tokens, crc32 = table.T
    beyond = (offset < 0) | (length < 1) | (length > shard.bytes) | (offset > shard.bytes - length)
    uncounted = (documents < 1) | (tokens < documents) | (tokens > shard.tokens) | (crc32 < 0) | (crc32 >> 32 != 0)
    if (beyond | uncounted).any():
        row = int(np.argmax(beyond | uncounted))
        found = ", ".join(f"{name} {value}" for name, value in zip(INDEX_COLUMNS, table[row].tolist(), strict=True))
        raise ValueError(f"record {row} has {found}, which is impossible in a shard of {shard.bytes} bytes")
