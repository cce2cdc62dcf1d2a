"""The pipeline stages that a dry run promises are those that DeepSpeed cuts."""

from __future__ import annotations

import pytest

from nextlat_dist.plan.describe import stage_contents
from tests.kit.harness import Ranks

LAYOUTS = [(1, 1), (4, 2), (4, 4), (5, 2), (7, 4), (8, 3), (22, 3), (22, 4), (22, 8), (23, 8)]  # layers, stages


def cut(after: int) -> list[list[int]]:
    """Decoder layers of each stage by DeepSpeed's rule, with one entry before them and so many after them."""
    from deepspeed.runtime.utils import partition_balanced

    sizes = []
    for layers, stages in LAYOUTS:
        parts = partition_balanced(weights=[0] + [1] * layers + [0] * after, num_parts=stages)
        owners = [range(parts[i], parts[i + 1]) for i in range(stages)]
        sizes.append([sum(1 for entry in owned if 1 <= entry <= layers) for owned in owners])
    return sizes


@pytest.mark.parametrize("after", [2, 3, 4], ids=["next-token", "nextlat", "tied"])
def test_stages_are_deepspeeds(after: int, one_rank: Ranks) -> None:
    promised = []
    for layers, stages in LAYOUTS:
        bounds = [text.split("decoder layers ")[1].split(",")[0].split("..") for text in stage_contents(layers, stages)]
        promised.append([int(last) - int(first) + 1 for first, last in bounds])
    assert promised == one_rank.run(cut, after)[0]
