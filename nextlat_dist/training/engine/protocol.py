"""The engine as training sees it: steps that can be refused, evaluation, views of the state that a checkpoint holds.

`deepspeed_engine` is the one binding; nothing else in the package knows what an engine is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from nextlat_dist.checkpoint.tensors import Fragment
from nextlat_dist.model.rows import Batch
from nextlat_dist.model.sharding import Rules
from nextlat_dist.training.engine.time_split import TimeSplit

Judge = Callable[[torch.Tensor, torch.Tensor], Sequence[tuple[bool, float]]]
"""(this rank's term sums [terms], its shares of the squared gradient norms, float64 [parts]), both on the device ->
of each part (whether the step is applied, its global gradient norm before clipping: the root of all shares together).

A part is what has a gradient norm of its own: the base, with all that is trained with it; what is trained apart.

Called on every rank once a step, before the optimizer acts, so it may exchange. All ranks must answer alike.
"""


class StateViews(Protocol):
    """Where the training state is: what a checkpoint reads and writes; see `master_state`."""

    @property
    def module(self) -> nn.Module:
        """The layers of this rank."""

    @property
    def sharding(self) -> Rules:
        """How the model's parameters are split over tensor ranks."""

    @property
    def every_data_rank_holds_all(self) -> bool:
        """Data-parallel ranks hold the same state, instead of a part each."""

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """What this rank holds of a parameter's fp32 master weight and moments, as views; None for nothing."""

    def set_weight(self, parameter: nn.Parameter, local: torch.Tensor) -> None:
        """Fill the copy that the forward pass uses, in its own precision, from this tensor rank's flattened shard."""

    def is_tied_copy(self, parameter: nn.Parameter) -> bool:
        """The parameter is a later pipeline stage's copy of one that an earlier stage holds too."""

    def optimizer_steps(self) -> int:
        """Steps that the optimizer has taken with the first part."""

    def set_optimizer_steps(self, steps: Sequence[int]) -> None:
        """Make it continue from there, with each part."""


class Engine(StateViews, Protocol):
    """Model and optimizer of this rank, whatever the layout; takes one global batch a step."""

    @property
    def device(self) -> torch.device: ...

    @property
    def time_split(self) -> TimeSplit:
        """Where the time of its steps goes."""

    def close(self) -> None:
        """The last call: what the engine holds can be freed. On every rank, without waiting for the others."""

    def set_learning_rate(self, value: float) -> None: ...

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        weights: torch.Tensor,
        judge: Judge | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """One optimizer step over this data-parallel rank's rows, unless `judge` refuses it. Collective.

        What is refused of a step leaves weights, moments and the optimizer's step count as they were, bit for bit.

        Args:
            micro_batches: as many as accumulation steps.
            weights: of the term sums [terms], for the global batch (`objective.terms.term_weights`).
            judge: None: of every step that is applied whose gradient norm is finite.
            meanwhile: called once, on every rank, when a GPU still has the backward pass to do and the host has not.

        Returns:
            This rank's term sums [terms], float64; zeros where no loss is computed.
        """

    def gradient_norm(self, part: int = 0) -> float:
        """Global L2 norm of the last step's gradient, before clipping; infinite where it was not a number."""

    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Term sums [terms] of this rank's rows, float64, without a step. Collective."""
