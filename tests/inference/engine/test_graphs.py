"""Decoding in static shapes against decoding in ragged ones: the same tokens; captured where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.huggingface.drafters.latent_predictor import save_draft_vocabulary
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.inference import load
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.latent_predictor import build
from nextlat_dist.inference.engine import graphs
from nextlat_dist.inference.engine import llama as llama_module
from nextlat_dist.inference.engine.graphs import MOST_IDLE_CACHES, SLOTS, WIDTHS, Graphs, StaticLlama, power_of_two
from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration, Costs
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export

CALIBRATION = Calibration(
    "cpu", Costs({1: 0.01, 64: 0.02}, {1: {1: 1.0, 17: 1.2}}), [Acceptance(0.0, [0.7, 0.6], [0.5, 1.0, 0.0])]
)
PROMPTS = [[1, 5, 6, 7], [1], [1, *range(3, 29)], [1, 9, 8], [1, 2, 3]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=40, max_position_embeddings=80)
    weights = random_weights(config, scale=0.12)
    directory = write_export(tmp_path_factory.mktemp("graphs"), config, weights, random_predictor(32, scale=0.05))
    save_draft_vocabulary(directory, torch.arange(0, 40, 3))
    return directory


def static_decoder(export: Path, device: str, capture: bool) -> Decoder:
    opened = open_export(export)
    llama = StaticLlama(opened.config, opened.weights, device, torch.float64, capture=capture)
    assert opened.drafter is not None
    return Decoder(opened, llama, build(opened.drafter, llama, Graphs(capture)))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("draft_length", [0, 1, 4, "adaptive"])
def test_static_shapes_change_nothing(
    export: Path, draft_length: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_module, "PREFILL_CHUNK_TOKENS", 50)  # 10 tokens of each of the 5 prompts at a time
    ragged, static = load(export, "cpu", torch.float64), static_decoder(export, "cpu", capture=False)
    ragged.calibration = static.calibration = CALIBRATION
    for prompts, tokens in ((PROMPTS, 70), (PROMPTS[1:4], 9), (PROMPTS[:1], 30), (PROMPTS, 12)):
        results = [
            decoder.generate(
                prompts, max_new_tokens=tokens, draft_length=draft_length, temperature=temperature, seed=3,
                ignore_eos=tokens == 70,
            )
            for decoder in (ragged, static)
        ]  # fmt: skip
        for one, other in zip(*results, strict=True):
            assert one.token_ids == other.token_ids
            assert one.drafted_by_position == other.drafted_by_position
        assert sum(result.drafted for result in results[0]) > 0 or draft_length == 0


@torch.inference_mode()
@pytest.mark.parametrize("counts", [(1, 1, 1), (4, 4, 4), (2, 5, 1)], ids=str)
def test_states_of_a_padded_block(export: Path, counts: tuple[int, ...]) -> None:
    ragged, static = load(export, "cpu", torch.float64).llama, static_decoder(export, "cpu", capture=False).llama
    prompts = [[1, 4, 5], [1], [1, 8, 9, 10, 11]]
    tokens = torch.arange(sum(counts)) + 12
    states = []
    for llama in (ragged, static):
        cache = llama.new_cache(3, 20)
        for _ in llama.prefill(prompts, cache):
            pass
        states.append(llama.forward(tokens, counts, cache))
        assert cache.lengths == [3 + counts[0], 1 + counts[1], 5 + counts[2]]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-12)


def test_a_cache_is_kept_for_the_next_batch_and_never_shared(export: Path) -> None:
    llama = static_decoder(export, "cpu", capture=False).llama
    first = llama.new_cache(3, 30)
    assert first.capacity % SLOTS == 0
    assert first.capacity >= 30 + WIDTHS[-1]
    assert first.keys[0].shape[0] == 4
    second = llama.new_cache(4, 31)
    assert second is not first
    second.release()
    assert llama.new_cache(4, 30) is second
    decoder = static_decoder(export, "cpu", capture=False)
    plain = decoder.generate([[1, 5]], max_new_tokens=12, draft_length=2)[0].token_ids
    one, other = (decoder.stream([1, 5], max_new_tokens=12, draft_length=2) for _ in range(2))
    mixed: list[list[int]] = [[], []]
    for pieces in zip(one, other, strict=True):
        for tokens, piece in zip(mixed, pieces, strict=True):
            tokens.extend(piece.token_ids)
    assert mixed == [plain, plain]


def test_caches_of_many_shapes_do_not_stay(export: Path) -> None:
    """Twelve shapes left twelve caches; a larger one that is idle serves, and the oldest idle ones go."""
    llama = static_decoder(export, "cpu", capture=False).llama
    assert isinstance(llama, StaticLlama)
    for rows in (1, 2, 4, 8, 16, 32):
        llama.new_cache(rows, 30).release()
    assert [cache.rows for cache in llama._caches] == [4, 8, 16, 32][-MOST_IDLE_CACHES:]
    busy = llama.new_cache(64, 30)
    assert len(llama._caches) == MOST_IDLE_CACHES
    assert busy in llama._caches
    llama.new_cache(3, 30)
    assert sorted(cache.rows for cache in llama._caches if cache.busy) == [8, 64], "the smallest that fits"
    for _ in range(3 * MOST_IDLE_CACHES):
        llama.new_cache(64, 30)  # busy ones are never taken away
    assert sum(cache.busy for cache in llama._caches) == 3 * MOST_IDLE_CACHES + 2


def test_a_smaller_batch_in_a_larger_cache(export: Path) -> None:
    decoder = static_decoder(export, "cpu", capture=False)
    prompts = [[1, 5], [1, 9, 4], [1], [1, 7], [1, 2, 3, 4]]
    options = {"max_new_tokens": 12, "draft_length": 2, "ignore_eos": True}
    fresh = [decoder.generate([prompt], **options)[0].token_ids for prompt in prompts]  # type: ignore[arg-type]
    together = decoder.generate(prompts, **options)  # type: ignore[arg-type]
    again = [decoder.generate([prompt], **options)[0].token_ids for prompt in prompts]  # type: ignore[arg-type]
    assert fresh == again == [row.token_ids for row in together]
    two = decoder.generate(prompts[:2], **options)  # type: ignore[arg-type]
    assert [row.token_ids for row in two] == fresh[:2]


def test_graphs_are_bounded_and_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used longest ago is captured again."""

    class Graph:
        def replay(self) -> None:
            pass

    captures: list[tuple[int, object]] = []

    def capture(function: Callable[..., Any], inputs: Any, pool: object) -> Any:
        captures.append((int(inputs[0][0]), pool))
        return graphs._Captured(Graph(), tuple(x.clone() for x in inputs), function(*inputs))

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda: "the pool")
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    kept = Graphs(capture=True)

    def run(key: int) -> None:
        kept.run(key, lambda x: (x,), torch.full((1,), key))

    for key in (0, 1, 2, 0, 3, 0, 1, 3):
        run(key)
    assert [key for key, _ in captures] == [0, 1, 2, 3, 1]
    assert {pool for _, pool in captures} == {"the pool"}
    assert len(kept._captured) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_shapes_leave_bounded_memory(export: Path) -> None:
    decoder = static_decoder(export, "cuda", capture=True)
    for rows in (1, 2, 4, 8, 16, 32, 3, 5):
        decoder.generate([[1, 5]] * rows, max_new_tokens=12, draft_length=2, ignore_eos=True)
    assert isinstance(decoder.llama, StaticLlama)
    assert len(decoder.llama._caches) <= MOST_IDLE_CACHES


def test_rows_are_padded_and_cut_off() -> None:
    seen = []

    def double(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append((x.shape, y.shape))
        return 2 * x, y

    x, y = Graphs(capture=False).run("double", double, torch.ones(3, 2), torch.arange(3))
    assert seen == [((4, 2), (4,))]
    assert (x.tolist(), y.tolist()) == ([[2.0, 2.0]] * 3, [0, 1, 2])
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("draft_length", [0, 1, 4, "adaptive"])
def test_captured_steps_change_nothing(export: Path, draft_length: int, temperature: float) -> None:
    plain, captured = static_decoder(export, "cuda", capture=False), static_decoder(export, "cuda", capture=True)
    plain.calibration = captured.calibration = Calibration("cuda", CALIBRATION.costs, CALIBRATION.acceptance)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
        results = [
            decoder.generate(
                prompts, max_new_tokens=40, draft_length=draft_length, temperature=temperature, ignore_eos=True
            )
            for decoder in (plain, captured)
        ]
        assert [one.token_ids for one in results[0]] == [one.token_ids for one in results[1]]
