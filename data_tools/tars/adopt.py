"""Make the index of a WebDataset tar that somebody else wrote, in one pass over it.

Invariant: the counts in the index are those of the decoder that training reads with, so both agree by construction;
every record of the tar is in the index, or named in the report because it is empty; whatever WebDataset would hand out
differently or not at all is an error that names the files.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from data_tools.shards.shard_report import REPORTED_NAMES
from data_tools.tars.tar_reader import TarDamage, TarMember, TarReader, tar_members
from nextlat_dist.data.members import EmptyDocument, load_tokenizer, record_decoder, text_of
from nextlat_dist.data.shard_format import IndexEntry, Manifest, ShardEntry, index_bytes
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.errors import UserError

NO_EXTENSION = "(no extension)"
META_FILE = re.compile(r"__[^/]*__($|/)")  # webdataset skips these
OPTIONS = "--tokenizer, --text-member, --token-member or --text-field"


@dataclass(frozen=True)
class AdoptedTar:
    """What is known of one tar.

    Attributes:
        entry: as the manifest lists it.
        stamp: of the file when it was read.
        empty, not_lossless: {"count", "names"} of the documents without text or tokens, which are left out, and of
            those whose text does not come back from their tokens.
        ignored: files that are not the wanted member, by extension.
        without: {"count", "names"} of the records without the wanted member, which are left out.
    """

    entry: ShardEntry
    stamp: str
    empty: dict[str, Any]
    not_lossless: dict[str, Any]
    ignored: dict[str, int]
    without: dict[str, Any] = field(default_factory=lambda: {"count": 0, "names": []})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> AdoptedTar:
        return cls(**{**raw, "entry": ShardEntry(**raw["entry"])})


class Adopter:
    """Adopts tars of one dataset. `template` is its manifest without shards, `model` the tokenizer file's content."""

    def __init__(self, template: Manifest, model: bytes) -> None:
        self._entry = template.members
        self._decode = record_decoder(template, model)
        self._tokenizer = load_tokenizer(model)

    def __call__(
        self, storage: Storage, name: str, size: int, moved: Callable[[int], object]
    ) -> tuple[AdoptedTar, bytes]:
        """The tar's description and its index; `moved` is told of the bytes read.

        Raises:
            UserError: the tar is damaged or changes meanwhile, its names collide, or a record is not what was asked
                for.
        """
        path, stamp = storage.full_name(name), storage.stamp(name)
        reader = TarReader(storage, name, size, moved)
        records = _Records(path, self._entry.member)
        entries: list[IndexEntry] = []
        names: dict[str, list[str]] = {"empty": [], "not_lossless": []}
        try:
            for member in tar_members(reader, records.is_wanted):
                if records.add(member.name):
                    found, remark = self._index(member, reader, path)
                    entries += [found] if found is not None else []
                    if remark is not None:
                        names[remark].append(member.name)
                reader.release(member.end)
            records.close()
            sha256 = reader.finish()
        except TarDamage as error:
            raise UserError(f"tar {path} is damaged: {error}; copy or write it again") from None
        except OSError as error:
            raise UserError(f"tar {path} cannot be read ({error}); copy it again") from None
        if storage.stamp(name) != stamp:
            raise UserError(f"tar {path} was changed while it was read; run the command again when it is complete")
        index = index_bytes(entries)
        entry = ShardEntry(
            name=name,
            bytes=size,
            sha256=sha256,
            index_sha256=hashlib.sha256(index).hexdigest(),
            records=len(entries),
            documents=len(entries),
            tokens=sum(found.tokens for found in entries),
        )
        names["without"] = records.without
        lists = {key: {"count": len(found), "names": found[:REPORTED_NAMES]} for key, found in names.items()}
        return AdoptedTar(entry, stamp, **lists, ignored=dict(sorted(records.ignored.items()))), index

    def _index(self, member: TarMember, reader: TarReader, path: str) -> tuple[IndexEntry | None, str | None]:
        """Entry of a document (None if it is empty) and remark on it. The range is that of this one member, so that
        pictures next to it are never read."""
        try:
            record = self._decode({self._entry.member: member.content})
        except EmptyDocument:
            return None, "empty"
        except ValueError as error:
            raise UserError(f"{member.name} in {path} cannot be used: {error}; correct the tar or {OPTIONS}") from None
        lossless = self._entry.kind == "tokens" or (
            self._tokenizer.decode(record.tokens) == text_of(member.content, self._entry.field)
        )
        data = reader.span(member.begin, member.end)
        entry = IndexEntry(member.begin, len(data), 1, len(record.tokens), zlib.crc32(data))
        return entry, None if lossless else "not_lossless"


class _Records:
    """Groups the files of a tar into records as webdataset does, and refuses what it would group by mistake."""

    def __init__(self, path: str, wanted: str) -> None:
        # Imported here because the package imports torch where torch is installed.
        from webdataset.tariterators import base_plus_ext

        self._split = base_plus_ext
        self._path, self._wanted = path, wanted
        self._seen: set[str] = set()
        self._key: str | None = None
        self._files: dict[str, str] = {}
        self.ignored: Counter[str] = Counter()
        self.without: list[str] = []

    def is_wanted(self, name: str) -> bool:
        return not META_FILE.match(name) and (self._split(name)[1] or "").lower() == self._wanted

    def add(self, name: str) -> bool:
        """Take the next file; True if it is the wanted member of its record. Raises UserError if names collide."""
        key, extension = self._split(name)
        if key is None or extension is None or META_FILE.match(name):
            self.ignored[NO_EXTENSION] += 1
            return False
        if key != self._key:
            self.close()
            if key in self._seen:
                raise UserError(
                    f"record {key!r} comes twice in {self._path}, the second time with {name}; the files of a record "
                    "must follow one another and no other record may have its name"
                )
            self._seen.add(key)
            self._key, self._files = key, {}
        extension = extension.lower()
        if extension in self._files:
            raise UserError(
                f"{self._files[extension]} and {name} in {self._path} have the same name to WebDataset; rename one"
            )
        self._files[extension] = name
        if extension != self._wanted:
            self.ignored[extension] += 1
        return extension == self._wanted

    def close(self) -> None:
        """End the current record; one without a document is noted. Raises UserError when several look like one."""
        if self._key is None or self._wanted in self._files:
            return
        alike = [name for extension, name in self._files.items() if extension.endswith(f".{self._wanted}")]
        if len(alike) > 1:
            raise UserError(
                f"{' and '.join(alike[:3])} in {self._path} collide: WebDataset splits names at the first dot, so they "
                f"are one record {self._key!r} without a member {self._wanted}; rename them"
            )
        self.without.append(self._key)


def left_out(manifest: Manifest) -> dict[str, int]:
    """Records of each adopted tar that are not in its index."""
    # Of a manifest that anybody may have written, these values alone are checked.
    nothing = {"count": 0}
    return {
        tar["entry"]["name"]: tar["empty"]["count"] + tar.get("without", nothing)["count"]
        for tar in manifest.report.get("tars", [])
    }
