"""The token embedding whose gradient is deterministic on a GPU: the same values as the other one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kit import jobs
from tests.kit.harness import Ranks


def gradients(raw: dict[str, Any]) -> list[tuple[bool, torch.Tensor, torch.Tensor]]:
    """Of an embedding on a CPU, then of one on what is said to be a GPU: whether it indexes, e(x) and its gradient."""
    from nextlat_dist.model import layer_list
    from nextlat_dist.model.initialize import canonical_parameters

    config, dims = jobs.set_up(raw)
    rows, found = jobs.ragged_rows(4, seed=3, vocab=9), []
    for gpu in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_list, "has_cuda", lambda gpu=gpu: gpu)
            stack = layer_list.LayerStack(layer_list.layer_list(config, dims, torch.float64))
        layer_list.initialize(stack, config, dims)
        embedded, _ = stack.run(rows.message, stop=1)
        (embedded * torch.arange(embedded.numel()).view_as(embedded)).sum().backward()
        (gradient,) = (p.grad for name, p in canonical_parameters(stack) if name.startswith("embedding."))
        assert gradient is not None
        found.append((stack.layers[0].word_embeddings.deterministic_mode, embedded.detach(), gradient))
    return found


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_same_gradient(deterministic: bool, tensor_size: int, request: pytest.FixtureRequest) -> None:
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[tensor_size])
    parallel = {"tensor_model_parallel_size": tensor_size}
    raw = jobs.tiny_config(parallel=parallel, training={"deterministic": deterministic})
    for (on_cpu, ours, gradient), (on_gpu, theirs, expected) in ranks.run(gradients, raw):
        assert (on_cpu, on_gpu) == (False, deterministic)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_indexing_adds_up_in_one_order_on_a_gpu() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 512, device="cuda", requires_grad=True)
    tokens = torch.randint(0, 16, (64, 1024), device="cuda")
    factor = torch.randn(64, 1024, 512, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        (first,), (second,) = (torch.autograd.grad((weight[tokens] * factor).sum(), weight) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
