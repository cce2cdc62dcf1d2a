"""Write one dataset directory: records, shards, indices and, last, the manifest.

Invariant: the same documents in the same order give the same bytes everywhere (fixed time, owner and mode in the tar),
and a directory without `manifest.json` is unfinished, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.shards.long_documents import SpooledTokens, Tokens, chunks_of
from nextlat_dist.data.shard_format import (
    MANIFEST_FILE,
    IndexEntry,
    Manifest,
    Record,
    ShardEntry,
    TokenizerEntry,
    index_bytes,
    index_name,
    manifest_bytes,
    shard_name,
)
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import TOKENIZER_FILE, whole_file, write_whole

OWNER = "nextlat"  # of every member of a shard
READ_BYTES = 1 << 23


class _ChunkFile:
    """Chunks of bytes as the file that `tarfile` copies from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""

    def read(self, count: int) -> bytes:
        while len(self._held) < count and (chunk := next(self._chunks, None)) is not None:
            self._held += chunk
        data, self._held = self._held[:count], self._held[count:]
        return data


class _Shard:
    """One tar that is being written; `entries` get their crc32 when it is finished."""

    def __init__(self, path: Path) -> None:
        # Imported here because the package imports torch where torch is installed.
        from webdataset.writer import TarWriter

        self.path = path
        self.entries: list[IndexEntry] = []
        self.tokens = 0
        self._stack = ExitStack()
        self._file: BinaryIO = self._stack.enter_context(whole_file(path))
        self._tar = TarWriter(self._file, user=OWNER, group=OWNER, mode=0o444, encoder=False, mtime=0)

    def write(self, record: Record, extra: Mapping[str, bytes]) -> None:
        """Append a record; `extra` are members of it that training does not read."""
        begin = self._tar.tarstream.offset
        self._tar.write({"__key__": self._key, **record.members(), **extra})
        self._note(begin, len(record.ends), len(record.tokens))

    def write_long(self, documents: Sequence[Tokens], ends: np.ndarray, prompts: np.ndarray | None) -> None:
        """As `write`, to the byte, for documents that are not all in memory."""
        begin, tokens = self._tar.tarstream.offset, int(ends[-1])
        small = {"ends.npy": ends, "prompts.npy": prompts}
        members = {name: _npy_bytes(array) for name, array in small.items() if array is not None}
        self._tar.write({"__key__": self._key, **members})
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(documents[0].dtype),
                "fortran_order": False,
                "shape": (tokens,),
            },
        )
        # As webdataset's writer does, but not from bytes.
        info = tarfile.TarInfo(f"{self._key}.tokens.npy")
        info.size = len(header.getvalue()) + tokens * documents[0].dtype.itemsize
        info.mtime, info.mode = 0, self._tar.mode
        info.uname, info.gname = self._tar.user, self._tar.group
        self._tar.tarstream.addfile(info, _ChunkFile(chain([header.getvalue()], chunks_of(documents))))
        self._note(begin, len(ends), tokens)

    @property
    def _key(self) -> str:
        return f"{self.path.stem}-{len(self.entries):06d}"

    def _note(self, begin: int, documents: int, tokens: int) -> None:
        self.entries.append(IndexEntry(begin, self._tar.tarstream.offset - begin, documents, tokens, 0))
        self.tokens += tokens

    def finish(self) -> ShardEntry:
        """Close the tar, read it back for its digests, write the index, and give both their final names."""
        self._tar.close()
        self._file.seek(0)
        digest = hashlib.sha256()
        for number, entry in enumerate(self.entries):
            crc32, left = 0, entry.length
            while left:
                data = self._file.read(min(left, READ_BYTES))
                assert data, "the tar ends inside a record"
                digest.update(data)
                crc32, left = zlib.crc32(data, crc32), left - len(data)
            self.entries[number] = IndexEntry(**{**vars(entry), "crc32": crc32})
        digest.update(self._file.read())
        size = self._file.tell()
        index = index_bytes(self.entries)
        self._stack.close()
        write_whole(self.path.with_name(index_name(self.path.name)), index)
        return ShardEntry(
            name=self.path.name,
            bytes=size,
            sha256=digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            records=len(self.entries),
            documents=sum(entry.documents for entry in self.entries),
            tokens=self.tokens,
        )

    def abandon(self, error: BaseException) -> None:
        """Remove the temporary file. The tar is closed first: collected later it would write to the closed file.

        Closing writes what is buffered, which cannot work when it is a full disk that ends the run.
        """
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._stack.__exit__(type(error), error, error.__traceback__)


class DatasetWriter:
    """Writes the documents added to it as shards of `directory`; `finish` makes it a dataset.

    Args:
        record_tokens: a record is closed as soon as it has this many tokens.
        shard_tokens: a shard is closed as soon as it has this many tokens.
        overwrite: replace a finished dataset in `directory`.
        kept: the first shards, finished by an earlier run that was interrupted; documents are added after theirs.

    Attributes:
        shards: finished so far.

    Raises:
        UserError: `directory` holds a finished dataset already.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        tokenizer: Tokenizer,
        *,
        record_tokens: int,
        shard_tokens: int,
        has_prompts: bool,
        bos: bool,
        eos: bool,
        overwrite: bool,
        kept: Sequence[ShardEntry] = (),
    ) -> None:
        self.directory = directory
        self.split = split
        self._tokenizer = tokenizer
        self._record_tokens = record_tokens
        self._shard_tokens = shard_tokens
        self._has_prompts = has_prompts
        self._bos = bos
        self._eos = eos
        self.shards: list[ShardEntry] = list(kept)
        self._shard: _Shard | None = None
        self._documents: list[Tokens] = []
        self._prompts: list[int] = []
        self._extra: dict[str, list[np.ndarray]] = {}
        self._buffered_tokens = 0
        self._prepare(overwrite)

    def _prepare(self, overwrite: bool) -> None:
        """Leave nothing of an earlier run but the kept shards; its manifest goes first, so that it never vouches for
        half a dataset. A tar of that name from elsewhere is refused, not removed."""
        tars = sorted(self.directory.glob(f"{self.split}-[0-9]*.tar"))
        if foreign := [tar.name for tar in tars if tar.is_symlink() or not _is_written_here(tar)]:
            raise UserError(
                f"{self.directory} holds {foreign[0]}, which is no shard of this command: it stays; pass "
                "another --output"
            )
        manifest = self.directory / MANIFEST_FILE
        if manifest.exists():
            if not overwrite and not self.shards:
                raise UserError(f"{self.directory} already holds a dataset; pass --overwrite or another --output")
            manifest.unlink()
        self.directory.mkdir(parents=True, exist_ok=True)
        kept = {name for shard in self.shards for name in (shard.name, index_name(shard.name))}
        for pattern in (f"{self.split}-[0-9]*.tar", f"{self.split}-[0-9]*.index.npy", f".{self.split}-[0-9]*.tmp"):
            for stale in list(self.directory.glob(pattern)):
                if stale.name not in kept:
                    stale.unlink()

    @property
    def unfinished_tokens(self) -> int:
        """Tokens that were added since the last finished shard."""
        return self._buffered_tokens + (0 if self._shard is None else self._shard.tokens)

    def add(self, tokens: Tokens, prompt_tokens: int, extra: Mapping[str, np.ndarray] | None = None) -> bool:
        """Append a document: ids [tokens] in the stored type, of which `prompt_tokens` are never predicted.

        Args:
            extra: arrays with a row for every token, the same ones for every document: `labels` in the stored type
                are what is predicted, any other is written as the member of that name, for evaluation.

        Returns:
            Whether the document finished a shard, so that nothing that was added is unfinished.
        """
        self._documents.append(tokens)
        self._prompts.append(prompt_tokens)
        for name, array in (extra or {}).items():
            assert len(array) == len(tokens), f"{len(array)} {name} for {len(tokens)} tokens"
            self._extra.setdefault(name, []).append(array)
        self._buffered_tokens += len(tokens)
        if self._buffered_tokens < self._record_tokens:
            return False
        self._flush_record()
        return self._shard is None

    def _flush_record(self) -> None:
        documents, arrays = self._documents, self._extra
        largest = max(each.largest if isinstance(each, SpooledTokens) else int(each.max()) for each in documents)
        assert 0 <= largest < self._tokenizer.vocab_size, "an id outside the vocabulary"
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        prompts = np.array(self._prompts, dtype=np.int64) if self._has_prompts else None
        self._documents, self._prompts, self._extra, self._buffered_tokens = [], [], {}, 0
        if self._shard is None:
            self._shard = _Shard(self.directory / shard_name(self.split, len(self.shards)))
        here = [document for document in documents if isinstance(document, np.ndarray)]
        if len(here) < len(documents):
            assert not arrays, "only documents in memory have labels"
            self._shard.write_long(documents, ends, prompts)
        else:
            extra = {name: np.concatenate(each) for name, each in arrays.items()}
            record = Record(np.concatenate(here), ends, prompts, extra.pop("labels", None))
            assert all(len(array) == len(record.tokens) for array in extra.values()), "a document without them"
            self._shard.write(record, {f"{name}.npy": _npy_bytes(array) for name, array in extra.items()})
        if self._shard.tokens >= self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self.shards.append(self._shard.finish())
        self._shard = None

    def flush(self) -> int:
        """Write what is buffered, finish the last shard, and return how many documents there are."""
        if self._documents:
            self._flush_record()
        if self._shard is not None:
            self._finish_shard()
        return sum(shard.documents for shard in self.shards)

    def finish(self, report: dict[str, Any]) -> Manifest:
        """Copy the tokenizer and write the manifest; call `flush` before."""
        assert not self._documents
        assert self._shard is None
        tokenizer = self._tokenizer
        write_whole(self.directory / TOKENIZER_FILE, tokenizer.model)
        manifest = Manifest(
            split=self.split,
            tokenizer=TokenizerEntry(
                TOKENIZER_FILE,
                tokenizer.sha256,
                tokenizer.vocab_size,
                tokenizer.bos_id,
                tokenizer.eos_id,
                tokenizer.pad_id,
            ),
            shards=tuple(self.shards),
            has_prompts=self._has_prompts,
            bos=self._bos,
            eos=self._eos,
            report=report,
        )
        write_whole(self.directory / MANIFEST_FILE, manifest_bytes(manifest))
        return manifest

    def abandon(self, error: BaseException) -> None:
        """Leave no temporary file; shards finished so far stay, without a manifest."""
        if self._shard is not None:
            self._shard.abandon(error)
            self._shard = None


def _is_written_here(tar: Path) -> bool:
    """Whether its first member belongs to whom all members of our shards belong to."""
    with tar.open("rb") as file:
        return file.read(512)[265:297].rstrip(b"\0").decode("latin1") == OWNER  # uname of a ustar header


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
