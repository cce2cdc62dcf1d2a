"""Scores of the city: legal turns, trips that arrive, histories that a model takes for the same, detours, streets.

    score_city(ExportWalker(model, context), city, documents, temperatures=(0.0, 1.0), seed=0) -> CityScores

- `legal_turns_teacher_forced`: share of turns, along the documents' walks, where the likeliest token is a street there.
  `legal_probability_teacher_forced`: the probability of legal tokens instead. `stops_teacher_forced`: walks at whose
  end EOS is the likeliest.
- `valid_greedy`, `valid_t1`, …: trips written from (pickup, drop-off) that are legal and stop at the drop-off.
- `compression_greedy`: pairs of histories of one situation (`city.histories`) with identical greedy continuations,
  right or wrong: a model that says the same whatever came before compresses perfectly. `valid_from_history_greedy` is
  therefore shown with it: the continuation of the pair's first history is legal and stops at the drop-off.
- `compression_sampled`, `compression_sampled_all`: see `city.compression`.
- `distinction_…`: see `city.distinction`. `distinction_sampled_…`: see `city.sampled_distinction`.
- `detours_…`: see `city.detours`.
- `streets_driven`: share of the city's streets (sides) that occur in the written trips; `impossible_streets`: how many
  do that are not there; `impossible_turns`: share of turns.

Invariant: every number is a function of (walker, city, documents, seed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nextlat_dist.evaluation.tasks.city.compression import sampled_compression
from nextlat_dist.evaluation.tasks.city.detours import Kind, drive_with_detours
from nextlat_dist.evaluation.tasks.city.distinction import distinction, histories_apart
from nextlat_dist.evaluation.tasks.city.histories import HistorySampler, Situation
from nextlat_dist.evaluation.tasks.city.sampled_distinction import sampled_distinction
from nextlat_dist.evaluation.tasks.city.walker import Walker
from nextlat_dist.evaluation.tasks.scores import Curve, Scores, Share, Watch, unwatched
from nextlat_dist.tasks import Document
from nextlat_dist.tasks.city import NO_STREET, PROMPT_TOKENS, TURNS, City, Trip, turn_id

READ_TOGETHER = 256  # documents
SITUATIONS = 500  # a share of them has a standard error of 0.022 at most
PAIRS_APART = 200  # each tries up to 105 suffixes after both histories
DETOUR_TRIPS = 300  # 0.029 at most
DETOURS: tuple[tuple[Kind, float], ...] = (
    ("random", 0.1),
    ("random", 0.5),
    ("least_likely", 0.1),
    ("least_likely", 0.5),
)


@dataclass
class CityScores(Scores):
    """The scores, and the streets of the written trips.

    Attributes:
        driven: int64 [places, 4]: how often a trip turned so there, its first impossible turn included.
    """

    driven: np.ndarray = field(default_factory=lambda: np.zeros((0, len(TURNS)), dtype=np.int64))


def score_city(
    walker: Walker,
    city: City,
    documents: Sequence[Document],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
    watch: Watch = unwatched,
) -> CityScores:
    """All numbers of a walker on walks of the city.

    Args:
        documents: of the city, not those it was trained on.
        temperatures: of written trips; 0 is greedy.
        seed: of sampled trips, histories and detours.
    """
    problems = sorted({city.problem(document.tokens.tolist()) for document in documents})
    scores = CityScores(driven=np.zeros((city.places, len(TURNS)), dtype=np.int64))
    progress = watch("city", 3 + len(temperatures) + len(DETOURS))
    score_reading(walker, city, documents, scores)
    progress.add(sum(len(document.tokens) for document in documents))
    for temperature in temperatures:
        trips = write_trips(walker, city, problems, temperature, seed)
        name = "valid_greedy" if temperature == 0 else f"valid_t{temperature:g}"
        scores.numbers[name] = Share.of(trip.arrived for trip in trips)
        scores.driven += driven_streets(city, trips)
        progress.add(sum(len(trip.turns) for trip in trips))
    situations = list(HistorySampler(city, documents).situations(SITUATIONS, np.random.default_rng([seed, 1])))
    continued = continue_situations(walker, city, situations)
    scores.numbers["compression_greedy"] = Share.of(first == second for first, second in continued)
    scores.numbers["valid_from_history_greedy"] = Share.of(
        city.follow(situation.place, situation.drop_off, first).arrived
        for situation, (first, _) in zip(situations, continued, strict=True)
    )
    if situations:
        accepted, all_accepted = sampled_compression(walker, city, situations, seed)
        scores.numbers |= {"compression_sampled": accepted, "compression_sampled_all": all_accepted}
    progress.add(sum(situation.turns for situation in situations))
    apart = histories_apart(city, documents, PAIRS_APART, np.random.default_rng([seed, 4]))
    if apart:
        recall, precision = distinction(walker, city, apart)
        scores.numbers |= {"distinction_recall": recall, "distinction_precision": precision}
        recall, precision = sampled_distinction(walker, city, apart, seed)
        scores.numbers |= {"distinction_sampled_recall": recall, "distinction_sampled_precision": precision}
    progress.add(sum(pair.turns for pair in apart))
    chosen = np.random.default_rng([seed, 2]).permutation(len(problems))[:DETOUR_TRIPS]
    for kind, probability in DETOURS:
        rng = np.random.default_rng([seed, 3])
        arrived, detours = drive_with_detours(walker, city, [problems[row] for row in chosen], probability, kind, rng)
        scores.numbers[f"detours_{kind}_{probability:g}"] = arrived
        progress.add(round(detours * len(chosen)))
    scores.numbers |= street_numbers(city, scores.driven)
    return scores


def score_reading(walker: Walker, city: City, documents: Sequence[Document], scores: CityScores) -> None:
    """What is expected next along the documents' own walks, at every intersection from the pickup to the drop-off."""
    likeliest: list[np.ndarray] = []  # bool per turn: it is a street
    stops: list[bool] = []
    probability: list[np.ndarray] = []  # of all legal tokens, at every intersection
    streets: list[int] = []  # by turn, how many there are
    for start in range(0, len(documents), READ_TOGETHER):
        walks = [document.tokens[:-1].tolist() for document in documents[start : start + READ_TOGETHER]]
        for walk, read in zip(walks, walker.log_probabilities(walks), strict=True):
            pickup, drop_off = city.problem(walk)
            places = city.follow(pickup, drop_off, walk[PROMPT_TOKENS:]).places
            legal = [city.legal(place, drop_off) for place in places]
            expected = read[PROMPT_TOKENS - 1 :]
            right = np.array([int(row.argmax()) in ids for row, ids in zip(expected, legal, strict=True)])
            likeliest.append(right[:-1])
            stops.append(bool(right[-1]))
            probability.append(np.array([np.exp(row[ids]).sum() for row, ids in zip(expected, legal, strict=True)]))
            streets += [len(ids) for ids in legal[:-1]]
    scores.numbers["legal_turns_teacher_forced"] = float(np.concatenate(likeliest).mean())
    scores.guesses["legal_turns_teacher_forced"] = float(np.mean(streets)) / len(TURNS)
    scores.numbers["legal_probability_teacher_forced"] = float(np.concatenate(probability).mean())
    scores.numbers["stops_teacher_forced"] = Share.of(stops)
    scores.curves["legal_teacher_forced"] = Curve.of(1, likeliest)


def write_trips(
    walker: Walker, city: City, problems: Sequence[tuple[int, int]], temperature: float, seed: int
) -> list[Trip]:
    """What the walker writes for each (pickup, drop-off), driven through the city."""
    prompts = [city.prompt(*problem) for problem in problems]
    written = walker.continuations(prompts, city.max_turns + 1, temperature, seed)
    return [city.follow(*problem, tokens) for problem, tokens in zip(problems, written, strict=True)]


def continue_situations(
    walker: Walker, city: City, situations: Sequence[Situation]
) -> list[tuple[list[int], list[int]]]:
    """The greedy continuations of each situation's two histories, as far as its turns go."""
    if not situations:
        return []
    longest = city.max_turns + 1 - min(situation.turns for situation in situations)
    firsts = walker.continuations([situation.first for situation in situations], longest, 0.0, 0)
    seconds = walker.continuations([situation.second for situation in situations], longest, 0.0, 0)
    left = [city.max_turns + 1 - situation.turns for situation in situations]
    return [(first[:end], second[:end]) for first, second, end in zip(firsts, seconds, left, strict=True)]


def driven_streets(city: City, trips: Sequence[Trip]) -> np.ndarray:
    """int64 [places, 4]: how often they turned so there; a trip counts up to its first impossible turn, that included.

    EOS at a wrong intersection, and turns after the drop-off, are no streets.
    """
    driven = np.zeros((city.places, len(TURNS)), dtype=np.int64)
    for trip in trips:
        turns = list(trip.turns)
        if trip.illegal is not None and 0 <= trip.illegal - turn_id(0) < len(TURNS):
            impossible = trip.illegal - turn_id(0)
            if city.streets[trip.places[-1], impossible] == NO_STREET:
                turns.append(impossible)
        np.add.at(driven, (np.array(trip.places[: len(turns)], dtype=np.int64), np.array(turns, dtype=np.int64)), 1)
    return driven


def street_numbers(city: City, driven: np.ndarray) -> dict[str, float]:
    """How the driven streets compare to those of the city."""
    real = city.streets != NO_STREET
    return {
        "streets_driven": float((driven[real] > 0).mean()),
        "impossible_streets": float((driven[~real] > 0).sum()),
        "impossible_turns": float(driven[~real].sum() / max(driven.sum(), 1)),
    }
