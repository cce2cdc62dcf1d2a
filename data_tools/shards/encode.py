"""Turn documents into tokens, in this process or in several, in the order in which they came.

Invariant: the result does not depend on the number of workers. What was not encoded exactly as found (empty, not UTF-8,
binary, changed by the tokenizer) is marked on each document, so that nothing is lost silently. A long document comes
and goes in pieces.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal

import numpy as np

from data_tools.shards.pieces import in_pieces
from data_tools.text.formats import is_binary, utf_encoding
from data_tools.text.sources import TextDocument
from nextlat_dist.data.shard_format import token_dtype
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError

OnInvalid = Literal["replace", "skip", "fail"]
Remark = Literal["empty", "binary", "utf16", "bad_line", "without", "invalid_utf8", "not_lossless", "cut", "long"]
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 4096
BATCHES_PER_WORKER = 3  # under way


@dataclass(frozen=True)
class Encoded:
    """A document, or a piece of one, as tokens.

    Attributes:
        tokens: [tokens] in the stored type, BOS and EOS included; None for a document that is left out.
        prompt_tokens: leading tokens that belong to BOS and prompt.
        remark: why it was left out ("empty", "binary", "utf16", "bad_line", "invalid_utf8") or what was changed
            ("invalid_utf8": bytes that are no UTF-8 became U+FFFD; "not_lossless": decoding the tokens does not give
            the text back; "cut": tokenised in pieces that are not known to be safe).
        refusal: what is wrong with a document that must not be there.
        ends: the document is complete with it.
    """

    tokens: np.ndarray | None
    prompt_tokens: int = 0
    remark: Remark | None = None
    refusal: str | None = None
    ends: bool = True


@dataclass(frozen=True)
class _Text:
    document: TextDocument
    prompt: str
    text: str
    remark: Remark | None


class Encoder:
    """Encodes documents; `bos` and `eos` put these tokens around each.

    Attributes:
        model: content of the tokenizer's file.

    Raises:
        UserError: the tokenizer has no such token.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: bool, eos: bool, on_invalid: OnInvalid) -> None:
        for name, wanted, token in (("bos", bos, tokenizer.bos_id), ("eos", eos, tokenizer.eos_id)):
            if wanted and token < 0:
                raise UserError(f"the tokenizer has no {name.upper()} token; pass --no-{name} or use another tokenizer")
        self._tokenizer = tokenizer
        self.model = tokenizer.model
        self._bos = np.array([tokenizer.bos_id] if bos else [], dtype=np.int32)
        self._eos = np.array([tokenizer.eos_id] if eos else [], dtype=np.int32)
        self._no_tokens = np.array([], dtype=np.int32)
        self._on_invalid = on_invalid
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, documents: Sequence[TextDocument]) -> list[Encoded]:
        """All documents at once: a call of a library costs as much as a short document."""
        read = [self._read(document) for document in documents]
        texts = [found for found in read if isinstance(found, _Text)]
        encoded = iter(self._encode(texts) if texts else [])
        return [next(encoded) if isinstance(found, _Text) else found for found in read]

    def _read(self, document: TextDocument) -> _Text | Encoded:
        """The text of a document; one that is left out is encoded already."""
        if document.fault is not None:
            return self._invalid("bad_line", f"{document.fault}, or leave such lines out with --on-invalid skip")
        if not document.text and not document.prompt and document.begins and document.ends:
            return Encoded(None, remark="empty")
        if document.may_be_binary and document.begins:
            other: Remark = "utf16" if utf_encoding(document.text) else "binary"
            if other == "utf16" or is_binary(document.text):
                return Encoded(None, remark=other, ends=document.ends)
        prompt = document.prompt or b""
        remark: Remark | None = "cut" if document.cut_anywhere else None
        try:
            return _Text(document, prompt.decode(), document.text.decode(), remark)
        except UnicodeDecodeError as error:
            if self._on_invalid == "replace":
                as_text = [part.decode(errors="replace") for part in (prompt, document.text)]
                return _Text(document, as_text[0], as_text[1], "invalid_utf8")
            where = f"at byte {error.start}" if document.begins else "somewhere"
            return self._invalid(
                "invalid_utf8",
                f"{document.name} is not UTF-8 {where}; convert it or pass --on-invalid replace or skip",
                ends=document.ends,
            )

    def _invalid(self, remark: Remark, sentence: str, *, ends: bool = True) -> Encoded:
        """A document that is left out when asked for, refused otherwise."""
        return Encoded(None, remark=remark, refusal=None if self._on_invalid == "skip" else sentence, ends=ends)

    def _encode(self, texts: Sequence[_Text]) -> list[Encoded]:
        prompts = iter(self._tokenizer.encode_all([text.prompt for text in texts if text.prompt]))
        parts: list[np.ndarray] = []
        for text, ids in zip(texts, self._tokenizer.encode_all([text.text for text in texts]), strict=True):
            begin = self._bos if text.document.begins else self._no_tokens
            end = self._eos if text.document.ends else self._no_tokens
            parts += [begin, next(prompts) if text.prompt else self._no_tokens, ids, end]
        ends = list(accumulate(map(len, parts)))
        tokens = np.concatenate(parts)
        # Checked on the very tokens that are stored.
        exact = self._tokenizer.given_back(tokens, ends[3::4], [text.prompt + text.text for text in texts])
        stored = tokens.astype(self._dtype)
        found: list[Encoded] = []
        first = 0
        for text, is_exact, prompt_end, last in zip(texts, exact, ends[1::4], ends[3::4], strict=True):
            remark = text.remark or (None if is_exact else "not_lossless")
            found.append(Encoded(stored[first:last], prompt_end - first, remark, ends=text.document.ends))
            first = last
        return found


def encode_all(
    documents: Iterable[TextDocument], tokenizer: Path, *, bos: bool, eos: bool, on_invalid: OnInvalid, workers: int
) -> Generator[Encoded, None, None]:
    """Encode documents in order; with more than one worker in so many processes, with a bounded number under way.

    Raises:
        UserError: a document is refused, or a worker process was killed.
    """
    settings = (tokenizer, bos, eos, on_invalid)
    encoder = _encoder(*settings)  # also here, so that a worker's start cannot fail
    batches = _batches(in_pieces(documents, encoder.model))
    if workers == 1:
        for batch in batches:
            yield from _accepted(encoder(batch))
        return
    # spawn: forking a process that has imported numpy and torch copies their thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    pending: deque[Future[list[Encoded]]] = deque()

    def submit(count: int) -> None:
        for batch in islice(batches, count):
            with _interrupts_held_back():
                pending.append(pool.submit(_encode_batch, batch))

    try:
        submit(BATCHES_PER_WORKER * workers)
        while pending:
            encoded = pending.popleft().result()
            submit(1)
            yield from _accepted(encoded)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; lower --workers and run the same command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which a terminal sends to all: they inherit the mask of this thread.

    The parent gets it at the end of the block and ends the workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _accepted(encoded: Iterable[Encoded]) -> Iterator[Encoded]:
    """Raises UserError at a document that was refused, when those before it are through."""
    for each in encoded:
        if each.refusal is not None:
            raise UserError(each.refusal)
        yield each


def _encoder(tokenizer: Path, bos: bool, eos: bool, on_invalid: OnInvalid) -> Encoder:
    return Encoder(Tokenizer(tokenizer), bos=bos, eos=eos, on_invalid=on_invalid)


_worker_encoder: Encoder | None = None  # of a worker process, set once by its initializer


def _start_worker(tokenizer: Path, bos: bool, eos: bool, on_invalid: OnInvalid) -> None:
    global _worker_encoder  # noqa: PLW0603
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker_encoder = _encoder(tokenizer, bos, eos, on_invalid)


def _leave_with_parent() -> None:
    """End this worker when the parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_batch(batch: list[TextDocument]) -> list[Encoded]:
    assert _worker_encoder is not None
    return _worker_encoder(batch)
