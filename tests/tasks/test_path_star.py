from __future__ import annotations

import numpy as np
import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.tasks import BOS_ID, EOS_ID, words_of
from nextlat_dist.tasks.path_star import PathStar


def _edges(words: list[str]) -> list[tuple[str, str]]:
    listed = " ".join(words[1 : words.index("/")]).split(" | ")
    return [(first, second) for first, second in (edge.split() for edge in listed)]


@pytest.mark.parametrize(("arms", "length"), [(5, 5), (2, 2), (1, 4), (3, 7)])
def test_the_answer_is_the_one_way_from_start_to_goal(arms: int, length: int) -> None:
    task, rng = PathStar(arms=arms, length=length, nodes=40), np.random.default_rng(0)
    for _ in range(50):
        document = task.sample(rng, "train")
        words = words_of(task, document.tokens)
        edges = _edges(words)
        slash = words.index("/")
        start, goal = words[slash + 1 : slash + 3]
        assert words[slash + 3] == "="
        assert document.prompt_tokens == slash + 4
        came_from = {second: first for first, second in edges}
        assert len(edges) == len(came_from) == arms * (length - 1)  # every node but the centre is entered once
        path = [goal]
        while path[-1] in came_from:
            path.append(came_from[path[-1]])
        assert words[slash + 4 :] == [*reversed(path), "</s>"]
        assert (path[-1], len(path)) == (start, length)
        assert goal not in {first for first, _ in edges}
        assert sum(first == start for first, _ in edges) == arms


def test_the_papers_graph_has_69_tokens_besides_bos() -> None:
    document = PathStar(arms=5, length=5).sample(np.random.default_rng(0), "test")
    assert len(document.tokens) == 70
    assert (document.tokens[0], document.tokens[-1], document.prompt_tokens) == (BOS_ID, EOS_ID, 64)


@pytest.mark.parametrize(("arms", "length"), [(2, 2), (1, 3)])
def test_every_arm_every_node_and_every_order_is_as_likely(arms: int, length: int) -> None:
    task, rng = PathStar(arms=arms, length=length, nodes=3), np.random.default_rng(1)
    texts = [" ".join(words_of(task, task.sample(rng, "train").tokens)) for _ in range(6000)]
    # 3 centres, 2 orders of the arms, 2 goals; or 6 orders of the nodes, 2 of the edges
    counts = np.unique(texts, return_counts=True)[1]
    assert len(counts) == 12
    assert counts.min() > 500 - 5 * 22
    assert counts.max() < 500 + 5 * 22


def test_content_is_the_graph_whatever_its_order_and_goal() -> None:
    task, rng = PathStar(arms=2, length=3, nodes=5), np.random.default_rng(2)
    graphs: dict[frozenset[tuple[str, str]], set[bytes]] = {}
    for _ in range(3000):
        document = task.sample(rng, "train")
        edges = frozenset(_edges(words_of(task, document.tokens)))
        graphs.setdefault(edges, set()).add(document.content)
    assert len(graphs) == 60  # 5! orders of the nodes, of which two are one star
    assert all(len(contents) == 1 for contents in graphs.values())
    assert len(set().union(*graphs.values())) == 60


def test_stars_that_cannot_be() -> None:
    assert PathStar(arms=3, length=5, nodes=13).nodes == 13
    with pytest.raises(UserError, match="has 13 different nodes, but there are only 12 numbers; raise --nodes to at l"):
        PathStar(arms=3, length=5, nodes=12)
    with pytest.raises(UserError, match="--length 1 is no task; it must be at least 2"):
        PathStar(arms=3, length=1)
    with pytest.raises(UserError, match="--arms 0"):
        PathStar(arms=0, length=3)
