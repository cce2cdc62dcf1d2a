from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.members import EmptyDocument, load_tokenizer, record_decoder, split_members, text_of
from nextlat_dist.data.shard_format import Manifest, MembersEntry, Record, TokenizerEntry
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer

ENTRY = TokenizerEntry("tokenizer.model", "5ha", vocab_size=100, bos_id=1, eos_id=2, pad_id=3)
TOKENS = Manifest("train", ENTRY, (), False, True, True, {}, MembersEntry("tokens", "npy"))


def npy(*ids: int, dtype: Any = np.int64, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(ids, dtype=dtype), allow_pickle=allow_pickle)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_tokens_of_any_integer_type_become_the_stored_type(dtype: str) -> None:
    record = record_decoder(TOKENS, None)({"npy": npy(5, 99, 7, dtype=dtype), "jpg": b"not looked at"})
    assert record.tokens.dtype == np.uint16
    assert record.tokens.tolist() == [1, 5, 99, 7, 2]
    assert record.ends.tolist() == [5]
    assert record.prompts is None
    large = replace(TOKENS, tokenizer=replace(ENTRY, vocab_size=70000))
    assert record_decoder(large, None)({"npy": npy(5)}).tokens.dtype == np.uint32


@pytest.mark.parametrize(
    ("ids", "bos", "eos", "expected"),
    [
        ([5], True, True, [1, 5, 2]),
        ([1, 5, 2], True, True, [1, 5, 2]),
        ([1, 5], True, True, [1, 5, 2]),
        ([2], True, True, [1, 2]),
        ([5, 1, 2, 5], True, True, [1, 5, 1, 2, 5, 2]),
        ([5], False, True, [5, 2]),
        ([5], True, False, [1, 5]),
        ([1, 5, 2], False, False, [1, 5, 2]),
    ],
)
def test_bos_and_eos_are_put_where_they_are_missing(ids: list[int], bos: bool, eos: bool, expected: list[int]) -> None:
    decode = record_decoder(replace(TOKENS, bos=bos, eos=eos), None)
    assert decode({"npy": npy(*ids)}).tokens.tolist() == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"npy": npy(5, 100)}, "token id 100 is not in the tokenizer's vocabulary of 100 ids"),
        ({"npy": npy(5, -1)}, "token id -1 is not in"),
        ({"npy": npy(2**63 + 9, dtype="u8")}, f"token id {2**63 + 9} is not in"),
        ({"npy": npy(5, dtype="f4")}, "whole numbers"),
        ({"npy": npy(5, dtype=object, allow_pickle=True)}, "whole numbers"),
        ({"npy": pickle.dumps([5])}, "whole numbers"),
        ({"npy": npy(5, 6)[:-1]}, "buffer"),
        ({"npy": b""}, "whole numbers"),
        ({"txt": b"5"}, "no member npy"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_decoder(TOKENS, None)(members)


def test_a_table_of_ids_is_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[5, 6]]))
    with pytest.raises(ValueError, match=r"array of \[1, 2\], not one row"):
        record_decoder(TOKENS, None)({"npy": buffer.getvalue()})


@pytest.mark.parametrize(("field", "content"), [(None, "naïve\r\n\0 text"), ("body", json.dumps({"body": "naïve"}))])
def test_text_is_tokenised(field: str | None, content: str) -> None:
    model = tiny_tokenizer().read_bytes()
    tokenizer = Tokenizer(tiny_tokenizer())
    entry = TokenizerEntry("tokenizer.model", tokenizer.sha256, tokenizer.vocab_size, 1, 2, 3)
    manifest = replace(TOKENS, tokenizer=entry, members=MembersEntry("text", "txt", field))
    record = record_decoder(manifest, model)({"TXT": content.encode()})
    text = content if field is None else "naïve"
    assert record.tokens.tolist() == [1, *tokenizer.encode(text), 2]
    assert tokenizer.decode(record.tokens) == text


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (b"caf\xe9", None, "not UTF-8 at byte 3"),
        (b"{", "text", "is not JSON"),
        (b"[1]", "text", "no field 'text', it is a JSON list"),
        (b'{"body": "x", "url": "y"}', "text", "no field 'text', only body, url"),
        (b'{"text": 5}', "text", "is a int, not a string"),
        (b'{"text": "\\ud800"}', "text", "surrogate"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, field: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        text_of(content, field)
    assert not isinstance(caught.value, EmptyDocument)


def test_empty_documents_are_told_apart() -> None:
    for content, field in ((b"", None), (b'{"text": ""}', "text"), (b'{"text": null}', "text")):
        with pytest.raises(EmptyDocument):
            text_of(content, field)
    with pytest.raises(EmptyDocument):
        record_decoder(TOKENS, None)({"npy": npy()})


def test_blocks_decode_to_themselves() -> None:
    record = Record(np.array([5, 6, 7], np.uint16), np.array([1, 3]), np.array([0, 1]))
    decoded = record_decoder(replace(TOKENS, members=MembersEntry()), None)(record.members())
    assert decoded.tokens.tolist() == [5, 6, 7]
    assert decoded.ends.tolist() == [1, 3]


def test_a_byte_range_of_a_tar_is_split_into_its_members() -> None:
    import webdataset

    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as writer:
        writer.write({"__key__": "folder/a", "txt": "text", "b.json": {"x": 1}})
    assert split_members(buffer.getvalue()) == {"txt": b"text", "b.json": b'{"x": 1}'}


def test_the_tokenizer_is_made_of_its_bytes() -> None:
    model = tiny_tokenizer().read_bytes()
    assert load_tokenizer(model).sha256 == Tokenizer(tiny_tokenizer()).sha256
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(b"no model")
