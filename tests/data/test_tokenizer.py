from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "\t\ttabs\n\n\nlines\r\nwindows\rmac",
    "\x00 nul \x7f",
    "▁",
    "a▁b ▁ ▁▁",
    "<s></s><unk><pad><0x41>",
    "▅⁇\ufffd\ufeff\u2028\u00a0\u3000",
    "ﬁ ﷺ é e\u0301 Ⅷ",  # normalisation would change these
    "😀👩‍👩‍👧 한국어 中文",
    "0123456789 3.14",
    "import os\n\n\ndef main():\n    return os.path.join('a', \"b\")\n",
]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
@example("▁a")
@example("\x00")
def test_every_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_come_back(text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_ids_are_the_fixed_ones_and_pieces_are_learned() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (600, 1, 2, 3)
    assert len(tokenizer.encode("        return")) <= 2, "runs of spaces are learned with what follows"
    assert len(tokenizer.encode("1234")) == 4, "digits stay single"


def test_the_hash_is_of_the_file(tmp_path: Path) -> None:
    assert Tokenizer(tiny_tokenizer()).sha256 == hashlib.sha256(tiny_tokenizer().read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 100, b'{"model": 1}'])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        Tokenizer(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path)
