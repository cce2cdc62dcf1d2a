from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from data_tools.text.sources import TextDocument
from data_tools.text.tokenizer import SENTENCE_BYTES, sample, sentences, train_tokenizer
from nextlat_dist.errors import UserError

TEXT = Path(__file__).read_text() * 3


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    files = [tmp_path / "a.model", tmp_path / "folder/b.model"]
    for file in files:
        train_tokenizer([TEXT], file, vocab_size=350)
    first, second = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert first == second


def test_sentences_are_the_text_in_pieces_that_fit() -> None:
    texts = [TEXT, "", "é" * 10000, "\n" * 9000, "no line end"]
    pieces = list(sentences(texts))
    assert "".join(pieces) == "".join(texts)
    assert max(len(piece.encode()) for piece in pieces) <= SENTENCE_BYTES
    assert "" not in pieces


def test_the_sample_depends_on_names_and_seed_not_on_order() -> None:
    documents = [TextDocument(f"{n}.txt", f"text {n};".encode() * 20, None, None, 0) for n in range(100)]
    size = sum(len(d.text) for d in documents)
    chosen = sample(documents, size // 4, seed=0)
    assert size / 4 <= sum(map(len, chosen)) < size / 4 + 200
    assert chosen == sample(reversed(documents), size // 4, seed=0)
    assert chosen != sample(documents, size // 4, seed=1)
    assert sorted(sample(documents, 2 * size, seed=0)) == sorted(d.text.decode() for d in documents)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 400, "no text to train a tokenizer on"),
        ([""], 400, "no text to train a tokenizer on"),
        (["a short text"], 4096, "cannot make a vocabulary of 4096 .*too high"),
        ([TEXT], 200, "cannot make a vocabulary of 200"),
        ([TEXT], 0, "cannot make a vocabulary of 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(texts, tmp_path / "tokenizer.model", vocab_size)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_goes_into_a_pipe(tmp_path: Path) -> None:
    """It is not read back: a pipe gives nothing back, and a device something else."""
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    tokenizer = train_tokenizer([TEXT], tmp_path / "pipe", vocab_size=350)
    reader.join(10)
    train_tokenizer([TEXT], tmp_path / "file", vocab_size=350)
    assert read == [tokenizer.model] == [(tmp_path / "file").read_bytes()]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tmp_path / "pipe").is_fifo()
