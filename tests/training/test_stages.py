"""The pipeline stages that a dry run promises are those that DeepSpeed cuts."""

from __future__ import annotations

import pytest

from nextlat_dist.training.run import _stages
from tests.distributed.harness import Ranks


def cut(layers: int, stages: int, around: tuple[int, int]) -> list[int]:
    """Decoder layers of each stage by DeepSpeed's rule, with so many other entries before and after them."""
    from deepspeed.runtime.utils import partition_balanced

    before, after = around
    parts = partition_balanced(weights=[0] * before + [1] * layers + [0] * after, num_parts=stages)
    return [
        sum(1 for entry in range(parts[i], parts[i + 1]) if before <= entry < before + layers) for i in range(stages)
    ]


@pytest.mark.parametrize("after", [2, 3, 4], ids=["next-token", "nextlat", "tied"])
def test_stages_are_deepspeeds(after: int, one_rank: Ranks) -> None:
    for layers, stages in ((1, 1), (4, 2), (4, 4), (5, 2), (7, 4), (8, 3), (22, 3), (22, 4), (22, 8), (23, 8)):
        promised = []
        for text in _stages(layers, stages):
            first, last = text.split("decoder layers ")[1].split(",")[0].split("..")
            promised.append(int(last) - int(first) + 1)
        assert promised == one_rank.run(cut, layers, stages, (1, after))[0], (layers, stages)
