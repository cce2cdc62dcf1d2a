"""Sequence compression as Vafa et al. 2024 have it: is what a model writes after one history likely after the other?

Of two histories that say the same (`city.histories`), `CONTINUATIONS` are sampled at temperature 1 from the first; one
is accepted if each of its tokens has a probability above `EPSILON` after the second. A model that continues both alike
accepts nearly all of its own: unlike in the share of identical greedy continuations, near-ties do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nextlat_dist.evaluation.tasks.city.distinction import EPSILON
from nextlat_dist.evaluation.tasks.city.histories import Situation
from nextlat_dist.evaluation.tasks.city.walker import Walker
from nextlat_dist.evaluation.tasks.scores import Share
from nextlat_dist.tasks.city import City

CONTINUATIONS, TRIALS = 30, 100  # as in Vafa et al.


def sampled_compression(walker: Walker, city: City, situations: Sequence[Situation], seed: int) -> tuple[float, Share]:
    """The mean share of accepted continuations, and the share of trials in which all are; of the first `TRIALS`
    situations.
    """
    trials = situations[:TRIALS]
    firsts = [list(trial.first) for trial in trials for _ in range(CONTINUATIONS)]
    longest = city.max_turns + 1 - min(trial.turns for trial in trials)
    written = walker.continuations(firsts, longest, 1.0, seed)
    seconds = [trial.second for trial in trials for _ in range(CONTINUATIONS)]
    left = [city.max_turns + 1 - trial.turns for trial in trials for _ in range(CONTINUATIONS)]
    written = [tokens[:end] for tokens, end in zip(written, left, strict=True)]
    read = walker.log_probabilities([[*second, *tokens[:-1]] for second, tokens in zip(seconds, written, strict=True)])
    accepted = np.array(
        [
            all(row[len(second) - 1 + place][token] > np.log(EPSILON) for place, token in enumerate(tokens))
            for row, second, tokens in zip(read, seconds, written, strict=True)
        ]
    ).reshape(len(trials), CONTINUATIONS)
    return float(accepted.mean()), Share.of(bool(row.all()) for row in accepted)
