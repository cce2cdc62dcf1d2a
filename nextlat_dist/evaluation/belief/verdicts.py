"""The criteria of a belief state: the four properties, their thresholds and the sentences that give the verdict.

Every threshold lies between what exact beliefs reach and the best that states without any tie to their history can do,
far from both, and is the same for every process; `tests/evaluation/belief/test_measure.py` holds both controls against
them. Effective rank has no threshold: a compact state is no virtue if it is not sufficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextlat_dist.evaluation.belief.rows import BeliefRow


@dataclass(frozen=True)
class Property:
    """`measure` of a row holds if it is at least (`at_least`) or at most `threshold`."""

    name: str
    measure: str
    threshold: float
    at_least: bool
    meaning: str
    reason: str

    def holds(self, row: BeliefRow) -> bool | None:
        """None where it could not be measured."""
        value: float | None = getattr(row, self.measure)
        return None if value is None else (value >= self.threshold if self.at_least else value <= self.threshold)


DECODABLE = Property(
    "decodable",
    "linear_r2",
    0.9,
    True,
    "the exact belief can be read off the state by a linear map (R² on documents held out)",
    "beliefs give 1, shuffled states 0; the last token alone is shown next to it as the floor",
)
SUFFICIENT = Property(
    "sufficient",
    "worst_kl_ratio",
    0.1,
    False,
    "the distribution of the future, rolled out from the state alone, is close to the true one (largest KL of any "
    "step, as a share of that of a distribution that knows no history)",
    "beliefs give 0; the state of another history gives 1 or more at the first step, since it is worse than the mean "
    "distribution",
)
EQUIVALENT = Property(
    "equivalent",
    "equivalence_auc",
    0.9,
    True,
    "histories of equal belief, their last tokens as unlike as can be, lie nearer to each other than histories of "
    "different belief with the same last tokens (AUC)",
    "beliefs give 1, shuffled states 0.5, states that only know the last tokens less than 0.5",
)
CONSISTENT = Property(
    "consistent",
    "worst_transition_error",
    0.5,
    False,
    "p_ψ predicts the state that the transformer goes to, step after step, also for tokens that did not come (largest "
    "error of any step, in units of the spread of states)",
    "beliefs give 0, the mean state 1, the state of another history 1.4",
)
PROPERTIES = (DECODABLE, SUFFICIENT, EQUIVALENT, CONSISTENT)


def verdicts(name: str, rows: Sequence[BeliefRow]) -> list[str]:
    """A sentence per property for the runs of one model."""
    sentences = []
    for entry in PROPERTIES:
        values = [getattr(row, entry.measure) for row in rows]
        if None in values:
            sentences.append(f"{name} · {entry.name}: not measured, the documents have too few histories to compare.")
            continue
        held = sum(bool(entry.holds(row)) for row in rows)
        word = (
            "holds" if held == len(rows) else "does not hold" if held == 0 else f"holds in {held} of {len(rows)} runs"
        )
        limit = f"{'≥' if entry.at_least else '≤'} {entry.threshold:g}"
        shown = ", ".join(f"{value:.3f}" for value in values)
        sentences.append(f"{name} · {entry.name}: {word} ({shown}; wanted {limit}): {entry.meaning}.")
    return sentences
