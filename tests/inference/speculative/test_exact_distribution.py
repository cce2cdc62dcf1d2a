"""The distribution of the whole engine, exactly: everything that its random numbers can make of it is enumerated.

A run is a step function of each number that it draws, the later ones being what they are. Number by number, the steps
are found by bisection and a run is continued from each, until it draws no more. The probabilities of all ends add up to
the joint distribution of the tokens, which is held against transformers' own forward over every prefix.

Command: `pytest tests/inference/speculative/test_exact_distribution.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.jtp import JointTokenPrediction
from nextlat_dist.inference.engine import engine as engine_module
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.generation import DraftLength, Request
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from nextlat_dist.inference.speculative.verify import Drafts
from nextlat_dist.inference.stopping import Stops
from tests.kit.exports import calibration, joint_distribution, reduced, tiny_world
from tests.kit.form_exports import jtp_world
from tests.kit.verifiers import WRONG_VERIFIERS, Verifier

EXACT = 1e-12
TOP = math.nextafter(1.0, 0.0)
PROMPT = [0]
ROWS = 1024
Trace = list[tuple[list[int], int, int]]  # per cycle: what was drafted, how much of it was kept, the token after it
Interval = tuple[int, float, float, Trace, Trace]  # of which node, its ends, and what they lead to


@dataclass
class Script:
    """Random numbers as written; those after the last are 0.5."""

    written: Sequence[float]
    used: int = 0

    def random(self) -> float:
        self.used += 1
        return self.written[self.used - 1] if self.used <= len(self.written) else 0.5


class Traced(DecodingEngine):
    """The engine; its rows draw their numbers from scripts, and what they draft and keep is noted."""

    def follow(self, scripts: list[Script]) -> list[Trace]:
        for row, script in zip(self.rows, scripts, strict=True):
            row.generator = script  # type: ignore[assignment]
        self.traces: list[Trace] = [[] for _ in scripts]
        for _ in self.run():
            pass
        return self.traces

    def verify(self, logits: torch.Tensor, drafts: Drafts) -> tuple[list[int], list[int]]:
        accepted, following = super().verify(logits, drafts)
        for row, tokens, kept, token in zip(self.rows, drafts.tokens(), accepted, following, strict=True):
            self.traces[row.number].append((tokens, kept, token))
        return accepted, following


@dataclass
class Engine:
    """What is run: `new_tokens` tokens after PROMPT."""

    decoder: Decoder
    sampling: Sampling
    new_tokens: int
    draft_length: DraftLength
    kind: type[Traced] = Traced

    def follow(self, scripts: list[Script]) -> list[Trace]:
        """One row per script, in batches."""
        policy = None
        if self.draft_length == "adaptive":
            longest = self.decoder.drafter.longest if self.decoder.drafter else None
            policy = AdaptivePolicy(calibration(), self.sampling.temperature, 1, longest)
        request = Request(self.new_tokens, self.draft_length, self.sampling, Stops(frozenset()))
        traces: list[Trace] = []
        for start in range(0, len(scripts), ROWS):
            part = scripts[start : start + ROWS]
            prompts, seeds = [PROMPT] * len(part), [0] * len(part)
            traces += self.kind(self.decoder.llama, self.decoder.drafter, prompts, request, policy, seeds).follow(part)
        return traces

    def distribution(self) -> dict[tuple[int, ...], float]:
        """Of all tokens, from every sequence of numbers."""
        distribution: dict[tuple[int, ...], float] = defaultdict(float)
        nodes: list[tuple[list[float], float]] = [([], 1.0)]
        while nodes:
            starts = [Script([*written, low]) for written, _ in nodes for low in (0.0, TOP)]
            traces = self.follow(starts)
            intervals: list[Interval] = []
            for index, (written, probability) in enumerate(nodes):
                if starts[2 * index].used <= len(written):  # it drew no more than that
                    distribution[emitted(traces[2 * index])] += probability
                else:
                    intervals.append((index, 0.0, TOP, traces[2 * index], traces[2 * index + 1]))
            nodes = self._steps(nodes, intervals)
        return distribution

    def _steps(
        self, nodes: list[tuple[list[float], float]], intervals: list[Interval]
    ) -> list[tuple[list[float], float]]:
        """Each node continued by one number from every step; a value of the step function must not come back."""
        lengths: dict[tuple[int, str], float] = defaultdict(float)
        # In the middle of a long part: on the edge of a step, the rounding of sums would decide.
        example: dict[tuple[int, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        while intervals:
            wide = []
            for index, low, high, first, last in intervals:
                if first == last:
                    step = index, repr(first)
                    lengths[step] += high - low
                    example[step] = max(example[step], (high - low, (low + high) / 2))
                elif high - low > 1e-15:
                    wide.append((index, low, high, first, last))
            middles = self.follow([Script([*nodes[index][0], (low + high) / 2]) for index, low, high, *_ in wide])
            intervals = []
            for (index, low, high, first, last), trace in zip(wide, middles, strict=True):
                middle = (low + high) / 2
                intervals += [(index, low, middle, first, trace), (index, middle, high, trace, last)]
        return [
            ([*nodes[index][0], example[index, trace][1]], nodes[index][1] * length)
            for (index, trace), length in lengths.items()
        ]


def emitted(trace: Trace) -> tuple[int, ...]:
    return tuple(token for drafted, kept, following in trace for token in (*drafted[:kept], following))


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Decoder]:
    return {
        size: load(tiny_world(tmp_path_factory.mktemp(f"world{size}"), size), "cpu", torch.float64) for size in (2, 3)
    }


def largest_error(engine: Engine) -> float:
    distribution = engine.distribution()
    expected = joint_distribution(engine.decoder.export, engine.sampling, PROMPT, engine.new_tokens)
    assert sum(expected.values()) == pytest.approx(1, abs=EXACT)
    assert set(distribution) <= set(expected)
    return max(abs(distribution.get(tokens, 0.0) - probability) for tokens, probability in expected.items())


CASES: dict[str, tuple[Any, ...]] = {
    # name: (vocabulary, new tokens, draft length, sampling, ids that may be drafted)
    "plain": (3, 3, 0, Sampling(1.0), None),
    "one draft": (3, 3, 1, Sampling(1.0), None),
    "cool, top-k": (3, 3, 1, Sampling(0.6, top_k=2), None),
    "hot, top-p": (3, 3, 1, Sampling(1.2, top_p=0.8), None),
    "reduced": (3, 3, 1, Sampling(1.0), [2, 0]),
    "two drafts": (2, 4, 2, Sampling(0.8), None),
    "adaptive": (2, 4, "adaptive", Sampling(1.0), None),
    "adaptive, reduced": (3, 3, "adaptive", Sampling(1.0, top_p=0.9), [1, 2]),
}
BIG_CASES: dict[str, tuple[Any, ...]] = {
    "three tokens, two drafts": (3, 4, 2, Sampling(1.0, top_p=0.95), None),
    "three tokens, adaptive": (3, 4, "adaptive", Sampling(0.9), None),
    "three drafts": (2, 5, 3, Sampling(1.0), None),
    "long and adaptive": (2, 5, "adaptive", Sampling(1.0), None),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in BIG_CASES)])
def test_joint_distribution_of_the_engine_is_the_base_models(case: str, decoders: dict[int, Decoder]) -> None:
    vocabulary, new_tokens, draft_length, sampling, ids = (CASES | BIG_CASES)[case]
    decoder = decoders[vocabulary]
    if ids:
        decoder = Decoder(decoder.opened, decoder.llama, reduced(decoder, ids))
    engine = Engine(decoder, sampling, new_tokens, draft_length)
    assert largest_error(engine) < EXACT


@pytest.fixture(scope="module")
def jtp_decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Decoder]:
    return {size: load(jtp_world(tmp_path_factory.mktemp(f"jtp{size}"), size), "cpu", torch.float64) for size in (2, 3)}


@pytest.mark.parametrize(
    "case",
    [
        case if case in CASES else pytest.param(case, marks=pytest.mark.slow)
        for case, (*_, ids) in (CASES | BIG_CASES).items()
        if ids is None
    ],
)
def test_so_it_is_with_the_drafter_of_jtp(case: str, jtp_decoders: dict[int, Decoder]) -> None:
    vocabulary, new_tokens, draft_length, sampling, _ = (CASES | BIG_CASES)[case]
    decoder = jtp_decoders[vocabulary]
    assert isinstance(decoder.drafter, JointTokenPrediction)
    assert largest_error(Engine(decoder, sampling, new_tokens, draft_length)) < EXACT


@pytest.mark.parametrize("wrong", WRONG_VERIFIERS)
def test_a_wrong_verifier_in_the_engine_is_noticed(
    wrong: Verifier, decoders: dict[int, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "verify_sampled", wrong)
    assert largest_error(Engine(decoders[3], Sampling(1.0), 3, 1)) > 1e-3


class DiscardsDrafts(Traced):
    """Throws away what it drafted from the first unlikely token on: a decision by the token's own value."""

    def draft(self) -> tuple[Drafts, list[list[float]]]:
        drafts, confidences = super().draft()
        gone: set[int] = set()
        for step in drafts.steps:
            assert step.q_token is not None
            assert step.q is not None
            gone |= {row for row, q in zip(step.rows, step.q_token, strict=True) if q < 0.5}
            on = [place for place, row in enumerate(step.rows) if row not in gone]
            step.q = step.q[on]
            step.rows, step.tokens = ([own[place] for place in on] for own in (step.rows, step.tokens))
            step.q_token = [step.q_token[place] for place in on]
        drafts.steps = [step for step in drafts.steps if step.rows]
        return drafts, confidences


class KeepsRejectedSlots(Traced):
    """Leaves one rejected slot in reach of what follows."""

    def cycle(self) -> Any:
        pieces = super().cycle()
        rejected = {piece.row for piece in pieces if len(self.traces[piece.row][-1][0]) > piece.accepted}
        self.cache.lengths = [
            length + (row.number in rejected) for row, length in zip(self.rows, self.cache.lengths, strict=True)
        ]
        return pieces


@pytest.mark.parametrize("kind", [DiscardsDrafts, KeepsRejectedSlots])
def test_a_wrong_engine_is_noticed(
    kind: type[Traced], decoders: dict[int, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoders[3]
    new_cache = decoder.llama.new_cache
    monkeypatch.setattr(decoder.llama, "new_cache", lambda rows, capacity: new_cache(rows, capacity + 4))
    assert largest_error(Engine(decoder, Sampling(1.0), 3, 1, kind)) > 1e-3
