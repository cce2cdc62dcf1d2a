"""Term sums of a step, collected where the loss is computed."""

from __future__ import annotations

import torch

from nextlat_dist.training.engine.step_terms import StepTerms


def test_step_terms_add_up_and_forgets() -> None:
    terms = StepTerms()
    device = torch.device("cpu")
    assert terms.take(3, device).tolist() == [0, 0, 0]
    sums = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = terms(sums, torch.tensor([1, 10, 100], dtype=torch.float64))
    terms(torch.tensor([0.5, 0.0, 1.0]), torch.zeros(3, dtype=torch.float64))
    loss.backward()
    assert (loss.item(), loss.dtype) == (321.0, torch.float32)
    assert sums.grad is not None
    assert sums.grad.tolist() == [1.0, 10.0, 100.0]
    taken = terms.take(3, device)
    assert (taken.tolist(), taken.dtype, taken.requires_grad) == ([1.5, 2.0, 4.0], torch.float64, False)
    assert terms.take(3, device).tolist() == [0, 0, 0]
