"""From the members of a WebDataset record to its documents.

A record of `nextlat-data shard` is a block of documents and decodes to itself. A record of an adopted tar is one
document: of token ids (`.npy`, any integer type), of text, or of a text field in JSON. Text is tokenised whenever a
record is read, which is slow: `nextlat-data reshard` makes a dataset of tokens of it.

Invariant: what a record decodes to depends on its bytes, the manifest and the tokenizer alone; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from nextlat_dist.data.shard_format import Manifest, Record, TokenizerEntry, npy_array, token_dtype
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError

# Of a file with holes: its header may say any size.
MAX_MEMBER_BYTES = 1 << 32
Decoder = Callable[[Mapping[str, bytes]], Record]


class EmptyDocument(ValueError):
    """A member without a token or character: no record can hold it."""


def record_decoder(manifest: Manifest, tokenizer: bytes | None) -> Decoder:
    """The function that makes a `Record` of a record's members, given as {extension: content}.

    Adopted documents start with BOS and end with EOS where the manifest says so; tokens that have them keep them.

    Args:
        tokenizer: content of the sentencepiece model, needed for `text` members only.

    The function raises ValueError for members that are not what the manifest says, EmptyDocument for empty ones.
    """
    entry = manifest.members
    if entry.kind == "block":
        return Record.from_members
    if entry.kind == "tokens":
        ids_of = _ids_of_array
    else:
        assert tokenizer is not None
        encode = load_tokenizer(tokenizer).encode

        def ids_of(content: bytes) -> np.ndarray:
            return np.array(encode(text_of(content, entry.field)), dtype=np.int32)

    return lambda members: _document(ids_of(_member(members, entry.member)), manifest)


def split_members(data: bytes) -> dict[str, bytes]:
    """{extension: content} of the files in a record's byte range; names are split as webdataset does."""
    # Imported here because the package imports torch where torch is installed.
    from webdataset.tariterators import base_plus_ext

    plain = _plain_members(data)
    if plain is None:
        try:
            plain = _all_members(data)
        except (tarfile.TarError, EOFError, OverflowError) as error:
            raise ValueError(f"its bytes are no members of a tar ({error})") from None
    return {base_plus_ext(name)[1]: content for name, content in plain.items()}


def _all_members(data: bytes) -> dict[str, bytes]:
    """Files of a tar range by name, those with holes (`tar -S`) as they were before."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)) is not None:
                if member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"member {member.name} has {member.size:,} bytes, too many to be held")
                members[member.name] = file.read()
    return members


def _plain_members(data: bytes) -> dict[str, bytes] | None:
    """Files of a tar range by name, None where a header is more than a plain one: the general reader, at `tarfile`'s
    speed, takes as long as everything else that is done with a record."""
    members: dict[str, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        header = data[at : at + tarfile.BLOCKSIZE]
        name, size = header[:100].rstrip(b"\0"), header[124:135]
        # An ordinary file whose name needs no prefix and whose size is written in octal digits.
        if header[156:157] != b"0" or header[345] or not size.isdigit() or not name.isascii():
            return None
        begin = at + tarfile.BLOCKSIZE
        end = begin + int(size, 8)
        members[name.decode()] = data[begin:end]
        at = begin + -(-(end - begin) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return members


def read_tokenizer(storage: Storage, manifest: Manifest) -> bytes:
    """Content of a dataset's tokenizer file.

    Raises:
        UserError: it cannot be read, or is not the one that made the dataset.
    """
    path = storage.full_name(manifest.tokenizer.file)
    try:
        model = storage.read(manifest.tokenizer.file)
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read ({error}); copy the dataset again") from None
    if hashlib.sha256(model).hexdigest() != manifest.tokenizer.sha256:
        raise UserError(f"{path} is not the tokenizer that made {storage.url}; copy the dataset again")
    return model


def load_tokenizer(model: bytes) -> Tokenizer:
    """The tokenizer with this content of a file. Raises UserError when it is no sentencepiece model."""
    return Tokenizer(Path("tokenizer.model"), model)


def _member(members: Mapping[str, bytes], wanted: str) -> bytes:
    """WebDataset takes `.TXT` for `.txt`, so this does too."""
    for name, content in members.items():
        if name is not None and name.lower() == wanted:
            return content
    raise ValueError(f"the record has no member {wanted}")


def text_of(content: bytes, field: str | None) -> str:
    """Text of a member: all of it, or one field of a JSON object.

    Raises:
        ValueError: it is not UTF-8, not a JSON object, or has no such field of text.
        EmptyDocument: there is no text.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 at byte {error.start}") from None
    if field is not None:
        text = _json_text(text, field)
    if not text:
        raise EmptyDocument("the text is empty")
    return text


def _json_text(text: str, field: str) -> str:
    try:
        raw = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the member is not JSON ({error})") from None
    if not isinstance(raw, dict) or field not in raw:
        there = f"only {', '.join(raw) or 'none'}" if isinstance(raw, dict) else f"it is a JSON {type(raw).__name__}"
        raise ValueError(f"the member has no field {field!r}, {there}")
    value = raw[field] or ""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is a {type(value).__name__}, not a string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"field {field!r} is not UTF-8: it holds half of a surrogate pair")
    return value


def _ids_of_array(content: bytes) -> np.ndarray:
    array = npy_array(content)
    if array.ndim != 1:
        raise ValueError(f"the member is an array of {list(array.shape)}, not one row")
    return array


def _document(ids: np.ndarray, manifest: Manifest) -> Record:
    tokenizer: TokenizerEntry = manifest.tokenizer
    if not len(ids):
        raise EmptyDocument("the document has no token")
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= tokenizer.vocab_size:
        outside = lowest if lowest < 0 else highest
        raise ValueError(f"token id {outside} is not in the tokenizer's vocabulary of {tokenizer.vocab_size} ids")
    dtype = token_dtype(tokenizer.vocab_size)
    before = [tokenizer.bos_id] if manifest.bos and ids[0] != tokenizer.bos_id else []
    after = [tokenizer.eos_id] if manifest.eos and ids[-1] != tokenizer.eos_id else []
    tokens = np.concatenate([np.array(before, dtype), ids.astype(dtype), np.array(after, dtype)])
    return Record(tokens, np.array([len(tokens)], dtype=np.int64))
