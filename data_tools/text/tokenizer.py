"""Train a lossless sentencepiece tokenizer.

Invariant: byte fallback, identity normalisation and no dummy prefix, so that every text comes back exactly; the same
input and options give the same bytes.

    nextlat-data tokenizer --input corpus/ --output corpus/tokenizer.model --vocab-size 4096
"""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data_tools.text.formats import is_binary, utf_encoding
from data_tools.text.sources import TextDocument
from data_tools.text.splits import unit_hash
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import write_whole

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
SENTENCE_BYTES = 4000  # sentencepiece leaves out longer ones than its own limit of 4192


def sample(documents: Iterable[TextDocument], limit_bytes: int, seed: int) -> list[str]:
    """Whole documents of about `limit_bytes` in total, chosen by a hash of seed and name; everything if there is less.
    Of a document that comes in pieces, each piece is chosen by itself.

    Holds no more than the sample in memory. Bytes that are not UTF-8 become U+FFFD; binary files are left out.

    Raises:
        UserError: a line holds no document.
    """
    kept: list[tuple[float, str, bytes]] = []  # a heap with the largest hash on top
    size = piece = 0
    for document in documents:
        if document.fault is not None:
            raise UserError(document.fault)
        piece = 0 if document.begins else piece + 1
        if not piece and document.may_be_binary and (is_binary(document.text) or utf_encoding(document.text)):
            continue
        name = f"{document.name}@{piece}" if piece else document.name
        heapq.heappush(kept, (-unit_hash(f"{seed}/{name}"), name, document.text))
        size += len(document.text)
        while size - len(kept[0][2]) >= limit_bytes:
            size -= len(heapq.heappop(kept)[2])
    return [text.decode("utf-8", "replace") for _, _, text in sorted(kept, reverse=True)]


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of whole lines that sentencepiece accepts, line ends included."""
    for text in texts:
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            # No character takes more than four bytes in UTF-8.
            for part in (line[at : at + SENTENCE_BYTES // 4] for at in range(0, len(line), SENTENCE_BYTES // 4)):
                length = len(part.encode())
                if size + length > SENTENCE_BYTES:
                    yield "".join(piece)
                    piece, size = [], 0
                piece.append(part)
                size += length
        if piece:
            yield "".join(piece)


def train_tokenizer(texts: Sequence[str], output: Path, vocab_size: int) -> Tokenizer:
    """Train a byte-pair model of exactly `vocab_size` ids on the texts and write it to `output`.

    Raises:
        UserError: there is no text, or not enough for this vocabulary.
    """
    if not any(texts):
        raise UserError("the input has no text to train a tokenizer on; change --input")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"^.*\]\s*", "", " ".join(str(error).split())).rstrip(".")
        raise UserError(
            f"sentencepiece cannot make a vocabulary of {vocab_size} from this input ({reason}); "
            "change --vocab-size or give more --input"
        ) from None
    write_whole(output, model.getvalue())
    return Tokenizer(output, model.getvalue())  # a device or a pipe does not give it back
