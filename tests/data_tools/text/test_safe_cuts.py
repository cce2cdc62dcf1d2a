from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_tools.shards import pieces
from data_tools.text.sources import TextDocument
from nextlat_dist.data.tokenizer import Tokenizer


def some_text(words: int) -> str:
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyzäé漢字"
    known = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(300)]
    ends = ["", "", "\n", ".", "  ", "\t"]
    return " ".join(draw.choice(known) + draw.choice(ends) for _ in range(words)) + "x▁y ▁ z" * 20


TEXT = some_text(8000)


def trained(folder: Path, **settings: Any) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:30_000].split("\n")), model_writer=model, minloglevel=2, **settings
    )
    (folder / "t.model").write_bytes(model.getvalue())
    return Tokenizer(folder / "t.model")


OURS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}


@pytest.mark.parametrize(
    "settings",
    [
        OURS | {"vocab_size": 500},
        OURS | {"vocab_size": 500, "add_dummy_prefix": True},
        OURS | {"vocab_size": 300, "byte_fallback": False, "split_by_whitespace": False},
        {"vocab_size": 300, "model_type": "bpe"},
        {"vocab_size": 300, "model_type": "unigram"},
        {"vocab_size": 60, "model_type": "char", "hard_vocab_limit": False},
    ],
    ids=["ours", "prefix", "across spaces", "bpe", "unigram", "char"],
)
def test_the_tokens_of_the_pieces_are_those_of_the_whole(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = trained(tmp_path, **settings)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(pieces, "UNCUT_BYTES", 8000)
    raw = TEXT.encode()
    found = list(pieces.in_pieces([TextDocument("x", raw, b"ask", None, len(raw))], tokenizer.model))
    assert len(found) > 30
    assert not any(piece.cut_anywhere for piece in found)
    assert [i for piece in found for i in tokenizer.encode(piece.text.decode())] == tokenizer.encode(TEXT)
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert [piece.prompt for piece in found] == [b"ask"] + [None] * (len(found) - 1)
    assert sum(piece.source_bytes for piece in found) == len(raw)


def test_where_no_place_is_safe_it_is_cut_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(tmp_path, **OURS, vocab_size=500)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(pieces, "UNCUT_BYTES", 4000)
    raw = b" " * 20_000  # joined by a piece of two spaces
    assert "  " in {tokenizer.decode([number]) for number in range(tokenizer.vocab_size)}
    found = list(pieces.in_pieces([TextDocument("x", raw, None, None, 0)], tokenizer.model))
    assert b"".join(piece.text for piece in found) == raw
    assert max(len(piece.text) for piece in found) <= 5000
    assert any(piece.cut_anywhere for piece in found)
