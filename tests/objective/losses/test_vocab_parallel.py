"""Cross entropy and KL over vocabulary shards equal torch's over the whole vocabulary, values and gradients."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextlat_dist.objective.losses.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_kl
from nextlat_dist.objective.output_head import OutputHead
from tests.kit.harness import Ranks

VOCAB, HIDDEN, LENGTH, BATCH, STEPS = 21, 6, 5, 3, 2
SIZES = ["one_rank", "two_ranks", "four_ranks"]
# 21 ids over 4 ranks: 24 leaves some padding on the last rank; with 64 two of four ranks hold nothing but padding.
PADDED = [24, 64]


def inputs(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    """States, targets, predicted states of two rollout steps, the real head weight, and a factor for every loss."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(LENGTH, BATCH, HIDDEN) * scale,
        "predicted": [draw(LENGTH - step, BATCH, HIDDEN) * scale for step in range(1, STEPS + 1)],
        "weight": draw(VOCAB, HIDDEN),
        "targets": torch.randint(0, VOCAB, (LENGTH, BATCH), generator=generator),
        "factors": [draw(LENGTH - step, BATCH) for step in range(STEPS + 1)],
    }


def results(
    data: dict[str, Any], cross_entropy: torch.Tensor, kl: list[torch.Tensor], weight: torch.Tensor
) -> dict[str, Any]:
    """Values, and the gradients of each term for everything it could reach; None where it reaches nothing."""
    sources = [data["hidden"], weight, *data["predicted"]]
    terms = [(cross_entropy * data["factors"][0]).sum()]
    terms += [(value * factor).sum() for value, factor in zip(kl, data["factors"][1:], strict=True)]
    gradients = [torch.autograd.grad(term, sources, retain_graph=True, allow_unused=True) for term in terms]
    return {"values": [cross_entropy.detach(), *(value.detach() for value in kl)], "gradients": gradients}


def on_full_vocabulary(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    data = inputs(dtype, scale)
    for tensor in (data["hidden"], data["weight"], *data["predicted"]):
        tensor.requires_grad_()
    logits = data["hidden"] @ data["weight"].T
    loss = F.cross_entropy(logits.permute(0, 2, 1), data["targets"], reduction="none")
    teacher = logits.detach().log_softmax(dim=-1)
    kl = []
    for step, state in enumerate(data["predicted"], start=1):
        student = (state @ data["weight"].detach().T).log_softmax(dim=-1)
        kl.append(F.kl_div(student, teacher[step:], reduction="none", log_target=True).sum(dim=-1))
    return results(data, loss, kl, data["weight"])


def on_shards(dtype: torch.dtype, padded: int, scale: float = 1.0) -> dict[str, Any]:
    """The same through `OutputHead` on this rank, its weight padded with rows that would win every softmax."""
    group: Any = dist.group.WORLD
    data = inputs(dtype, scale)
    head = OutputHead(
        SimpleNamespace(hidden_size=HIDDEN, params_dtype=dtype), VOCAB, padded, SimpleNamespace(tp=group), tied=False
    )
    full = torch.cat([data["weight"], torch.full((padded - VOCAB, HIDDEN), 50.0, dtype=dtype)])
    assert head.weight is not None
    with torch.no_grad():
        head.weight.copy_(full.chunk(group.size())[group.rank()])
    for tensor in (data["hidden"], *data["predicted"]):
        tensor.requires_grad_()
    loss, kl = head(data["hidden"], data["targets"], data["predicted"])
    return results(data, loss, kl, head.weight)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def compare(answers: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    for answer in answers:  # every rank knows every loss and the whole gradient of the states
        for actual, value in zip(answer["values"], expected["values"], strict=True):
            close(actual, value, tolerance)
    for term, reference in enumerate(expected["gradients"]):
        for source, gradient in enumerate(reference):
            parts = [answer["gradients"][term][source] for answer in answers]
            if gradient is None:
                assert parts == [None] * len(answers), (term, source)
            elif source == 1:
                whole = torch.cat(parts)
                close(whole[:VOCAB], gradient, tolerance)
                assert whole[VOCAB:].count_nonzero() == 0
            else:
                for part in parts:
                    close(part, gradient, tolerance)


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("pool", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_equal_to_torch_on_the_full_vocabulary(
    dtype: torch.dtype, tolerance: float, pool: str, padded: int, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue(pool)
    compare(ranks.run(on_shards, dtype, padded), on_full_vocabulary(dtype), tolerance)


def test_what_the_terms_reach() -> None:
    """The oracle itself: cross entropy reaches states and weight, KL the predicted states of its own step alone."""
    reached = [[g is not None for g in gradients] for gradients in on_full_vocabulary(torch.float64)["gradients"]]
    assert reached == [[True, True, False, False], [False, False, True, False], [False, False, False, True]]


@pytest.mark.parametrize("pool", SIZES)
def test_huge_logits_do_not_overflow(pool: str, request: pytest.FixtureRequest) -> None:
    """Logits of some ten thousand: e^x is far outside fp32, the losses are not."""
    answers = request.getfixturevalue(pool).run(on_shards, torch.float32, 24, 1e4)
    expected = on_full_vocabulary(torch.float64, 1e4)
    assert expected["values"][0].max() > 1e4
    for answer in answers:
        for actual, value in zip(answer["values"], expected["values"], strict=True):
            close(actual.double(), value, 1e-5)
        for gradients in answer["gradients"]:
            assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def identical_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """KL of a distribution from itself and the gradient of the student's logits."""
    group: Any = dist.group.WORLD
    generator = torch.Generator().manual_seed(1)
    logits = (10 * torch.randn(4, 12, generator=generator)).chunk(group.size(), dim=-1)[group.rank()].contiguous()
    _, log_sum_exp = vocab_parallel_cross_entropy(logits, torch.zeros(4, dtype=torch.long), group)
    student = logits.clone().requires_grad_()
    divergence = vocab_parallel_kl(student, logits, log_sum_exp, group)
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    return divergence.detach(), gradient


@pytest.mark.parametrize("pool", SIZES)
def test_identical_distributions_do_not_diverge(pool: str, request: pytest.FixtureRequest) -> None:
    for divergence, gradient in request.getfixturevalue(pool).run(identical_distributions):
        assert divergence.abs().max() == 0
        assert gradient.abs().max() == 0


def nearly_agreeing(noise: float, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """KL and gradient in fp32 of a student that differs by `noise`, and the same of those logits in fp64 by torch."""
    group: Any = dist.group.WORLD
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(50, 600, generator=generator)
    student = teacher + noise * torch.randn(50, 600, generator=generator) + shift
    ours, theirs = (x.chunk(group.size(), dim=-1)[group.rank()].contiguous() for x in (student, teacher))
    _, log_sum_exp = vocab_parallel_cross_entropy(theirs, torch.zeros(50, dtype=torch.long), group)
    divergence = vocab_parallel_kl(ours.requires_grad_(), theirs, log_sum_exp, group)
    (gradient,) = torch.autograd.grad(divergence.sum(), ours)
    exact = student.double().requires_grad_()
    logs = exact.log_softmax(-1), teacher.double().log_softmax(-1)
    expected = F.kl_div(*logs, reduction="none", log_target=True).sum(dim=-1)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    part = slope.chunk(group.size(), dim=-1)[group.rank()]
    return {
        "kl": divergence.detach().double(),
        "expected": expected.detach(),
        "gradient_error": (gradient.double() - part).norm() / part.norm(),
    }


@pytest.mark.parametrize("pool", ["one_rank", "two_ranks"])
@pytest.mark.parametrize(
    ("noise", "tolerance"), [(1.0, 2e-6), (0.1, 1e-5), (0.01, 1e-4), (0.001, 1e-3)], ids=lambda x: f"{x:g}"
)
def test_a_small_divergence_has_its_digits_in_fp32(
    noise: float, tolerance: float, pool: str, request: pytest.FixtureRequest
) -> None:
    """Down to a KL of 5e-7: the rounding of a log-sum-exp (about 2e-7) must not be in it."""
    for found in request.getfixturevalue(pool).run(nearly_agreeing, noise):
        expected = found["expected"]
        assert expected.mean() == pytest.approx(noise**2 / 2, rel=0.1)
        assert ((found["kl"] - expected).abs() / expected).max() < tolerance
        assert found["gradient_error"] < tolerance


@pytest.mark.parametrize("shift", [-60.0, 60.0, 1e4])
def test_a_shift_of_all_logits_is_no_divergence(shift: float, one_rank: Ranks) -> None:
    (found,) = one_rank.run(nearly_agreeing, 1.0, shift)
    torch.testing.assert_close(found["kl"], found["expected"], rtol=1e-5, atol=0)


def bf16_gradients() -> list[dict[str, torch.Tensor]]:
    return [_bf16_gradients(noise) for noise in (0.3, 0.003)]


def _bf16_gradients(noise: float) -> dict[str, torch.Tensor]:
    """Gradients of the student's logits where student and teacher nearly agree: bf16, and the same logits in fp32."""
    group: Any = dist.group.WORLD
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(64, 32, generator=generator).bfloat16()
    student = (teacher.float() + noise * torch.randn(64, 32, generator=generator)).bfloat16()
    gradients = {}
    for dtype in (torch.bfloat16, torch.float32):
        theirs, ours = (x.chunk(group.size(), dim=-1)[group.rank()].to(dtype) for x in (teacher, student))
        loss, log_sum_exp = vocab_parallel_cross_entropy(theirs, torch.zeros(64, dtype=torch.long), group)
        ours.requires_grad_()
        divergence = vocab_parallel_kl(ours, theirs, log_sum_exp, group)
        assert loss.dtype == log_sum_exp.dtype == divergence.dtype == torch.float32
        (gradient,) = torch.autograd.grad(divergence.sum(), ours)
        assert gradient.dtype == dtype
        gradients[str(dtype)] = gradient.float()
    return gradients


def test_bf16_gradient_survives_where_student_and_teacher_agree(two_ranks: Ranks) -> None:
    """Rounded once, after the subtraction: bf16 keeps 8 bits of each difference, however small."""
    for gradients in chain.from_iterable(two_ranks.run(bf16_gradients)):
        expected = gradients["torch.float32"]
        assert expected.count_nonzero() > expected.numel() / 2
        assert ((gradients["torch.bfloat16"] - expected).abs() <= 2**-8 * expected.abs()).all()


class Traffic(TorchDispatchMode):
    """Name and number of elements of every collective, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.append((func._opname, max(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def traffic() -> list[tuple[str, int]]:
    """What crosses ranks in one forward and backward pass."""
    with Traffic() as mode:
        on_shards(torch.float32, 64)
    return mode.seen


def test_only_numbers_per_position_cross_ranks(two_ranks: Ranks) -> None:
    """Forward: a maximum, and sums; backward: the gradient of the states. Never the vocabulary."""
    positions = LENGTH * BATCH
    for seen in two_ranks.run(traffic):
        assert {name for name, _ in seen} == {"allreduce_"}
        assert max(size for _, size in seen) == positions * HIDDEN < positions * VOCAB / 2
