"""The data of the belief report: documents of a hidden Markov process, their beliefs, pairs, counterfactuals.

    read_histories(dataset: Path, limit: int | None) -> Histories

All of it depends on the documents alone, never on a model, so that every model is asked the same questions.
Invariant: beliefs are Bayes' rule in float64, and those stored with the tokens agree with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.data import documents
from nextlat_dist.tasks import FIRST_SYMBOL_ID, task_of
from nextlat_dist.tasks.hmm import Hmm

FEWEST_DOCUMENTS = 20  # ten fit the probes and ten judge them
STEPS = 20  # of a rollout, or half a document where that is shorter
STORED_TOLERANCE = 1e-5  # beliefs are stored in float32: 1e-7 of a number up to 1, and sums differ between machines
POOL = 2000  # histories among which pairs are looked for: tables of 2000 x 2000 take 16 MB each in float32
SAME_BELIEF, OTHER_BELIEF = 0.01, 0.1  # total variation: at most, at least; a factor of ten between them
FEWEST_PAIRS = 30  # the standard error of an AUC of 0.9 is 0.04 then (Hanley & McNeil 1982)
LONGEST_SUFFIX = 16  # tokens at the end that are compared
CUTS = 2  # counterfactuals per document
POSSIBLE = 1e-3  # a token with less than that given the belief is not asked about: a model hardly saw it there


@dataclass(frozen=True)
class Histories:
    """Attributes:
    hmm: the process that the documents are of.
    tokens: int64 [n, length + 1], BOS first.
    beliefs: float64 [n, length + 1, states], after each token.
    """

    hmm: Hmm
    tokens: np.ndarray
    beliefs: np.ndarray

    @property
    def steps(self) -> int:
        return min(STEPS, self.hmm.length // 2)


def read_histories(dataset: Path, limit: int | None) -> Histories:
    """The first `limit` documents (None: all) of a dataset of `nextlat-data task hmm`.

    Raises:
        UserError: another dataset, too few or too short documents, or beliefs that are not those of the process.
    """
    manifest = read_manifest(open_storage(dataset))
    hmm = task_of(manifest)
    if not isinstance(hmm, Hmm):
        raise UserError(
            f"{dataset} is a dataset of the task {hmm.name}, whose beliefs nobody knows; give one of "
            "`nextlat-data task hmm` as --data"
        )
    read = list(documents(dataset, limit))
    if len(read) < FEWEST_DOCUMENTS or hmm.length < 4:
        raise UserError(
            f"{len(read)} documents of {hmm.length} tokens are too little to measure on; give {FEWEST_DOCUMENTS} or "
            "more of 4 tokens or more, by --data and --documents"
        )
    tokens = np.stack([document.tokens for document in read])
    beliefs = hmm.beliefs(tokens)
    stored = [document.beliefs for document in read]
    if any(own is None for own in stored) or np.abs(np.stack(stored) - beliefs).max() > STORED_TOLERANCE:  # type: ignore[arg-type]
        raise UserError(
            f"the beliefs stored in {dataset} are not those of its process; write it again with `nextlat-data task hmm`"
        )
    return Histories(hmm, tokens, beliefs)


class Pairs(NamedTuple):
    """Two histories each, as flat indices into [n · (length + 1)]; int64 [pairs, 2] each.

    Attributes:
        same: equal beliefs (total variation ≤ SAME_BELIEF) after different histories; of all such partners of a
            history the one whose last tokens are least like its own.
        other: beliefs apart (≥ OTHER_BELIEF), drawn at random.
        alike: beliefs apart, and of all such partners the one with the longest common ending.
    """

    same: np.ndarray
    other: np.ndarray
    alike: np.ndarray


def find_pairs(histories: Histories, seed: int) -> Pairs | None:
    """Pairs within a random pool of histories; None if there are too few to tell."""
    rng = np.random.default_rng(seed)
    n, width = histories.tokens.shape
    flat = (np.arange(n)[:, None] * width + np.arange(1, width)).reshape(-1)  # BOS alone is everybody's history
    pool = rng.permutation(flat)[:POOL]
    row, position = np.divmod(pool, width)
    beliefs = histories.beliefs[row, position].astype(np.float32)
    apart = np.zeros((len(pool), len(pool)), dtype=np.float32)
    for state in beliefs.T:
        apart += 0.5 * np.abs(state[:, None] - state[None])
    ending = np.zeros((len(pool), len(pool)), dtype=np.int16)  # tokens in common at the end
    running = np.ones_like(ending, dtype=bool)
    for back in range(min(LONGEST_SUFFIX, width)):
        index = position - back
        token = np.where(index >= 0, histories.tokens[row, np.maximum(index, 0)], -1 - row)
        running &= token[:, None] == token[None]
        ending += running
    equal_histories = (position[:, None] == position[None]) & (ending >= np.minimum(position + 1, LONGEST_SUFFIX))
    jitter = rng.random(ending.shape, dtype=np.float32)  # breaks ties

    def partners(allowed: np.ndarray, preferred: np.ndarray) -> np.ndarray:
        score = np.where(allowed, preferred, np.inf)
        best = score.argmin(axis=1)
        found = np.isfinite(score[np.arange(len(pool)), best])
        return np.stack([pool[found], pool[best[found]]], axis=1)

    same = partners((apart <= SAME_BELIEF) & ~equal_histories, ending + jitter)
    other = partners(apart >= OTHER_BELIEF, jitter)
    alike = partners(apart >= OTHER_BELIEF, jitter - ending)
    return Pairs(same, other, alike) if min(len(same), len(other)) >= FEWEST_PAIRS else None


class Counterfactuals(NamedTuple):
    """Histories that differ from a document from some token on.

    Attributes:
        tokens: int64 [m, length + 1]; padded after what counts.
        cuts: int64 [m]; tokens 0 .. cut are those of a document, then come `steps` tokens of the other future.
    """

    tokens: np.ndarray
    cuts: np.ndarray


def counterfactuals(histories: Histories, seed: int) -> Counterfactuals | None:
    """A token other than the document's, drawn evenly from the possible ones, then a future of the process.

    None if no token could have been another one anywhere.
    """
    rng = np.random.default_rng(seed)
    hmm, steps = histories.hmm, histories.steps
    probabilities = hmm.next_emission(histories.beliefs)
    tokens, cuts = [], []
    for row, document in enumerate(histories.tokens):
        for cut in rng.choice(hmm.length - steps + 1, size=min(CUTS, hmm.length - steps + 1), replace=False).tolist():
            possible = np.flatnonzero(probabilities[row, cut] >= POSSIBLE)
            possible = possible[possible != document[cut + 1] - FIRST_SYMBOL_ID]
            if len(possible) == 0:
                continue
            first = int(rng.choice(possible))
            belief = hmm.update(histories.beliefs[row, cut], np.array(first))
            future = [first, *hmm.emit(rng, int(rng.choice(len(belief), p=belief)), steps - 1)]
            own = np.full(len(document), FIRST_SYMBOL_ID)
            own[: cut + 1] = document[: cut + 1]
            own[cut + 1 : cut + 1 + steps] = np.array(future) + FIRST_SYMBOL_ID
            tokens.append(own)
            cuts.append(cut)
    return Counterfactuals(np.stack(tokens), np.array(cuts)) if cuts else None
