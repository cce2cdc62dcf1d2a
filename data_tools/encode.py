"""Turn documents into tokens, in this process or in several, in the order in which they came.

Invariant: the result does not depend on the number of workers. What was not encoded exactly as found (empty, not UTF-8,
binary, changed by the tokenizer) is marked on each document, so that nothing is lost in silence.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from data_tools.sources import Document
from nextlat_dist.data.shard_format import token_dtype
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError

OnInvalid = Literal["replace", "skip", "fail"]
BATCH_BYTES = 1 << 20
BINARY_PROBE_BYTES = 8192


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        document: without text and prompt.
        tokens: [tokens] in the stored type, BOS and EOS included; None for a document that is left out.
        prompt_tokens: leading tokens that belong to BOS and prompt.
        text_bytes: bytes of text and prompt.
        remark: why it was left out ("empty", "binary", "invalid_utf8") or what was changed ("invalid_utf8": bytes that
            are no UTF-8 became U+FFFD; "not_lossless": decoding the tokens does not give the text back).
    """

    document: Document
    tokens: np.ndarray | None
    prompt_tokens: int
    text_bytes: int
    remark: Literal["empty", "binary", "invalid_utf8", "not_lossless"] | None


class Encoder:
    """Encodes single documents; `bos` and `eos` put these tokens around each.

    Raises:
        UserError: the tokenizer has no such token.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: bool, eos: bool, on_invalid: OnInvalid) -> None:
        for name, wanted, token in (("bos", bos, tokenizer.bos_id), ("eos", eos, tokenizer.eos_id)):
            if wanted and token < 0:
                raise UserError(f"the tokenizer has no {name.upper()} token; pass --no-{name} or use another tokenizer")
        self._tokenizer = tokenizer
        self._bos = [tokenizer.bos_id] if bos else []
        self._eos = [tokenizer.eos_id] if eos else []
        self._on_invalid = on_invalid
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, document: Document) -> Encoded:
        """Raises UserError for bytes that are not UTF-8 under `on_invalid="fail"`."""
        raw = [document.prompt or b"", document.text]
        text_bytes = sum(map(len, raw))
        stub = Document(document.name, b"", None, document.split, document.source_bytes)
        if not text_bytes:
            return Encoded(stub, None, 0, 0, "empty")
        if document.may_be_binary and b"\0" in document.text[:BINARY_PROBE_BYTES]:
            return Encoded(stub, None, 0, text_bytes, "binary")
        try:
            prompt, text = (part.decode("utf-8") for part in raw)
            remark: Literal["invalid_utf8", "not_lossless"] | None = None
        except UnicodeDecodeError as error:
            if self._on_invalid == "fail":
                raise UserError(
                    f"{document.name} is not UTF-8 at byte {error.start}; "
                    "convert it or pass --on-invalid replace or skip"
                ) from None
            if self._on_invalid == "skip":
                return Encoded(stub, None, 0, text_bytes, "invalid_utf8")
            prompt, text = (part.decode("utf-8", "replace") for part in raw)
            remark = "invalid_utf8"
        prompt_ids, text_ids = self._tokenizer.encode(prompt), self._tokenizer.encode(text)
        if remark is None and (self._tokenizer.decode(prompt_ids), self._tokenizer.decode(text_ids)) != (prompt, text):
            remark = "not_lossless"
        tokens = np.array(self._bos + prompt_ids + text_ids + self._eos, dtype=self._dtype)
        return Encoded(stub, tokens, len(self._bos) + len(prompt_ids), text_bytes, remark)


def encode_all(
    documents: Iterable[Document], tokenizer: Path, *, bos: bool, eos: bool, on_invalid: OnInvalid, workers: int
) -> Generator[Encoded, None, None]:
    """Encode documents in order; with more than one worker in so many processes, with a bounded number under way."""
    settings = (tokenizer, bos, eos, on_invalid)
    if workers == 1:
        yield from map(_encoder(*settings), documents)
        return
    batches = _batches(documents)
    # spawn: forking a process that has imported numpy and torch copies their thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    try:
        pending: deque[Future[list[Encoded]]] = deque(
            pool.submit(_encode_batch, b) for b in islice(batches, 3 * workers)
        )
        while pending:
            encoded = pending.popleft().result()
            pending.extend(pool.submit(_encode_batch, b) for b in islice(batches, 1))
            yield from encoded
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoder(tokenizer: Path, bos: bool, eos: bool, on_invalid: OnInvalid) -> Encoder:
    return Encoder(Tokenizer(tokenizer), bos=bos, eos=eos, on_invalid=on_invalid)


_worker_encoder: Encoder | None = None  # of a worker process, set once by its initializer


def _start_worker(tokenizer: Path, bos: bool, eos: bool, on_invalid: OnInvalid) -> None:
    global _worker_encoder  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which then ends the workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker_encoder = _encoder(tokenizer, bos, eos, on_invalid)


def _leave_with_parent() -> None:
    """End this worker when the parent was killed: it would wait for work for ever."""
    import os

    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_batch(batch: list[Document]) -> list[Encoded]:
    assert _worker_encoder is not None
    return [_worker_encoder(document) for document in batch]
