"""Answers to tasks that ask a question: teacher-forced and free-running, token by token and as a whole.

*Teacher-forced*: every token of the true answer is predicted after the true ones before it. *Free-running*: the model
writes the whole answer after the question; a token is right when it is the true answer's token at that position.

Invariant: the question is never scored, the token that ends the answer always is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from nextlat_dist.evaluation.tasks.scores import Watch
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.state_model import StateModel
from nextlat_dist.tasks import EOS_ID, PAD_ID, Document

ROWS = 128  # documents run together


def answer_of(document: Document) -> np.ndarray:
    """int64 [answer tokens], the one that ends it included."""
    return document.tokens[document.prompt_tokens :]


def before_end(answer: np.ndarray) -> np.ndarray:
    """The tokens of a written answer before its first EOS, all of them if there is none."""
    return answer[: np.append(np.flatnonzero(answer == EOS_ID), len(answer))[0]]


def teacher_forced(model: StateModel, documents: Sequence[Document], watch: Watch) -> list[np.ndarray]:
    """bool [answer tokens] per document: whether the likeliest token there is the true one."""
    progress = watch("reading", math.ceil(len(documents) / ROWS))
    right: list[np.ndarray] = []
    for start in range(0, len(documents), ROWS):
        batch = documents[start : start + ROWS]
        lengths = [len(document.tokens) - 1 for document in batch]
        tokens = torch.full((len(batch), max(lengths)), PAD_ID)
        for row, document in enumerate(batch):
            tokens[row, : lengths[row]] = torch.from_numpy(document.tokens[:-1])
        states = model.states(tokens)
        answers = [answer_of(document) for document in batch]
        asked = torch.cat(
            [
                states[row, document.prompt_tokens - 1 : length]
                for row, (document, length) in enumerate(zip(batch, lengths, strict=True))
            ]
        )
        hits = model.logits(asked).argmax(dim=-1).cpu().numpy() == np.concatenate(answers)
        right += np.split(hits, np.cumsum([len(answer) for answer in answers])[:-1])
        progress.add(sum(lengths))
    return right


def write_answers(
    decoder: Decoder, documents: Sequence[Document], temperature: float, seed: int, watch: Watch
) -> list[np.ndarray]:
    """int64 [tokens] per document: what the model writes after the question, up to EOS or the longest true answer."""
    longest = max(len(answer_of(document)) for document in documents)
    progress = watch(f"answering at temperature {temperature:g}", math.ceil(len(documents) / ROWS))
    written: list[np.ndarray] = []
    for start in range(0, len(documents), ROWS):
        prompts = [document.tokens[: document.prompt_tokens].tolist() for document in documents[start : start + ROWS]]
        generations = decoder.generate(
            prompts, max_new_tokens=longest, draft_length=0, temperature=temperature, seed=seed + start
        )
        written += [np.array(generation.token_ids, dtype=np.int64) for generation in generations]
        progress.add(sum(len(generation.token_ids) for generation in generations))
    return written


def agreement(document: Document, written: np.ndarray) -> np.ndarray:
    """bool [answer tokens]: whether the written token at each position is the true one; a missing one is not."""
    answer = answer_of(document)
    right = np.zeros(len(answer), dtype=bool)
    shared = min(len(answer), len(written))
    right[:shared] = written[:shared] == answer[:shared]
    return right
