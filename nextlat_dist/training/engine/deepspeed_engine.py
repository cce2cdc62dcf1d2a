"""The DeepSpeed binding of `protocol.Engine`: the only file that knows what DeepSpeed keeps where.

Steps: all of ZeRO 0-3 and pipelines end in the `step` of the plain optimizer that we built. Where DeepSpeed wants the
gradient norm, the judge is asked with this rank's share of it, in the one exchange and read of a step (DeepSpeed
alone reads the norm and a count of infinities, and converts all gradients to float64 for them). A hook before the plain
`step` takes the gradients away if the answer is no; AdamW passes over a parameter without one (zeroed
gradients would still decay weights and moments). DeepSpeed leaves a step whose norm is not finite before it gets there.
Clipping is ours too: a pass over the gradients only where it changes them, and of a tied embedding once.

State:
- ZeRO 0: the parameters themselves and the plain optimizer's state; every data-parallel rank has all of it.
- ZeRO 1 and 2, and DeepSpeed's bf16 optimizer: a flat partition per parameter group and rank.
- ZeRO 3: a flat partition per sub-group and rank, with a padded share of every parameter.

Written for DeepSpeed 0.19.8, whose `safe_get_full_optimizer_state` fails for all groups but the first after the first
step, and whose own checkpoints are pickles that only the same layout can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, Fragment
from nextlat_dist.errors import UserError
from nextlat_dist.model.decoder_layer import set_documents
from nextlat_dist.model.rows import Batch
from nextlat_dist.model.sharding import Rules
from nextlat_dist.objective.fused_objective import FusedObjective, set_term_weights
from nextlat_dist.parallel.dims import ModelParallelUnit, ParallelDims, all_reduce_sum
from nextlat_dist.training.engine.gradient_norm import (
    clip_gradients,
    is_tied_copy,
    norm_of,
    of_parameters,
    of_partition,
    share_of,
)
from nextlat_dist.training.engine.optimizer import PART, ensure_state, set_learning_rate
from nextlat_dist.training.engine.partial import sum_partial_gradients
from nextlat_dist.training.engine.protocol import Judge
from nextlat_dist.training.engine.step_terms import StepTerms
from nextlat_dist.training.engine.time_split import OF_A_PIPELINE, TimeSplit


class DeepSpeedEngine:
    """See `protocol.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        step_terms: StepTerms,
        dims: ParallelDims,
        *,
        settings: dict[str, Any],
        sharding: Rules,
        terms: int,
        parts: int,
        clip_grad: float,
    ) -> None:
        """Wraps `module`, whose weights are drawn.

        Args:
            optimizer: over `module`'s parameters; DeepSpeed may wrap it.
            step_terms: the loss function of `module`, if that is a pipeline.
            settings: for `deepspeed.initialize`; see `deepspeed_config`.
            terms: length of the vector of terms.
            parts: of the model, that have a gradient norm each; a group of `optimizer` says of which it is.
            clip_grad: largest global gradient norm of a part; 0: no clipping.
        """
        import deepspeed

        self.dims, self._sharding = dims, sharding
        self._plain, self._step_terms, self._terms, self._clip_grad = optimizer, step_terms, terms, clip_grad
        _gather_what_is_read_directly(module)
        unit = ModelParallelUnit() if dims.pipeline_size == 1 else None
        self._inner, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, mpu=unit, dist_init_required=False, config=settings
        )
        self._zero_stage = int(self._inner.zero_optimization_stage())
        self._judge: Judge | None = None
        self._parts = parts
        self._applies: list[bool] | None = None  # what the judge said of the step under way
        self._norms = [math.inf] * parts
        self._meanwhile: Callable[[], None] | None = None
        self._time_split = TimeSplit(self.device)
        self._take_over()
        optimizer.register_step_pre_hook(self._before_step)
        sum_partial_gradients(self.module, sharding, dims.process_groups.tp)

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._inner.module
        return module

    @property
    def sharding(self) -> Rules:
        return self._sharding

    @property
    def optimizer(self) -> Any:
        """The optimizer as DeepSpeed wrapped it."""
        return self._inner.optimizer

    @property
    def device(self) -> torch.device:
        return torch.device(self._inner.device)

    @property
    def time_split(self) -> TimeSplit:
        return self._time_split

    def close(self) -> None:
        # DeepSpeed's hooks on gradients stand in the autograd graph, where no garbage collection sees that they and the
        # engine hold one another: the model, its optimizer and its groups' threads would stay as long as the process.
        # Under ZeRO-3 they still do: DeepSpeed 0.19.8 leaves more of them than it removes.
        self._inner.destroy()

    def set_learning_rate(self, value: float) -> None:
        set_learning_rate(self._inner.optimizer, value)

    def gradient_norm(self, part: int = 0) -> float:
        return self._norms[part]

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        weights: torch.Tensor,
        judge: Judge | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        self._judge, self._applies, self._meanwhile = judge, None, meanwhile
        # DeepSpeed averages over accumulation steps and data-parallel ranks; our weights are already global.
        scaled = without_waiting((weights * len(micro_batches) * self.dims.data_size).float(), self.device)
        set_term_weights(self.module, scaled)
        set_documents(self.module, micro_batches[0].documents)  # the same for all
        if self.dims.pipeline_size > 1:
            self._inner.train_batch(_pipeline_batches(micro_batches, scaled))
        else:
            self._inner.train()
            for number, batch in enumerate(micro_batches, start=1):
                with self._time_split.part("forward"):
                    loss = self._step_terms(self._inner(batch.message), scaled)
                with self._time_split.part("backward"):
                    self._inner.backward(loss)
                if number == len(micro_batches):
                    self._do_meanwhile()
                with self._time_split.part("step"):
                    self._inner.step()
        if self._applies is None:  # DeepSpeed left the step by itself
            self._ask(torch.full((self._parts,), math.inf, dtype=torch.float64, device=self.device))
        return self._step_terms.take(self._terms, self.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        weights = torch.zeros(self._terms, device=self.device)
        set_documents(self.module, micro_batches[0].documents)
        if self.dims.pipeline_size > 1:
            self._inner.eval_batch(
                _pipeline_batches(micro_batches, weights), reduce_output=None,
                num_micro_batches=len(micro_batches), bcast_loss=False,
            )  # fmt: skip
        else:
            self._inner.eval()
            for batch in micro_batches:
                self._step_terms(self._inner(batch.message), weights)
        self._inner.train()
        return self._step_terms.take(self._terms, self.device)

    def _do_meanwhile(self) -> None:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def _ask(self, shares: torch.Tensor) -> None:
        """`shares`: of the squared norms [parts], this rank's."""
        sums = self._step_terms.peek(self._terms, self.device)
        applies, norms = zip(*(self._judge or self._finite)(sums, shares), strict=True)
        self._applies, self._norms = list(applies), list(norms)

    def _finite(self, _: torch.Tensor, shares: torch.Tensor) -> list[tuple[bool, float]]:
        """The judge where there is none."""
        world = dist.group.WORLD
        assert world is not None
        norms = [norm_of(squares) for squares in all_reduce_sum(shares, world).tolist()]
        return [(math.isfinite(norm), norm) for norm in norms]

    def _answer(self, partitions: Iterable[tuple[int, list[Any], list[nn.Parameter]]]) -> torch.Tensor:
        """Ask about these gradients of ZeRO, (part, gradients, parameters) of each group. What it is told of the norm
        lies on the host, where it may read it; by one that is not finite it leaves the step, with all its parts.
        """
        rank = self.dims.tensor_rank
        self._ask(self._shares((part, of_partition(own, parameters, rank)) for part, own, parameters in partitions))
        assert self._applies is not None
        norm = self._norms[0]
        return torch.tensor(norm if math.isfinite(norm) or not any(self._applies) else 0.0)

    def _shares(self, gradients: Iterable[tuple[int, Iterable[torch.Tensor]]]) -> torch.Tensor:
        """This rank's [parts], from (part, gradients) of each group."""
        found: list[list[torch.Tensor]] = [[] for _ in range(self._parts)]
        for part, own in gradients:
            found[part] += own
        return torch.stack([share_of(own, self.device) for own in found])

    def _take_over(self) -> None:
        """Put ourselves where DeepSpeed asks for the norm, looks for infinities, clips, and calls its parts."""
        wrapped: Any = self._inner.optimizer
        kind = type(wrapped).__name__
        offloaded = getattr(wrapped, "cpu_offload", False) or getattr(wrapped, "offload_optimizer", False)
        if offloaded and self._parts > 1:
            raise UserError(
                "objective.detach_base=true needs the gradient norm of each part, and DeepSpeed has that of all "
                "together where its optimizer is offloaded; take offload_optimizer out of deepspeed.zero_optimization"
            )
        if kind == "DeepSpeedZeroOptimizer" and not offloaded:
            wrapped.check_grad_overflow = False  # the norm tells
            wrapped.scaled_global_norm = lambda norm_type=2: self._answer(
                (self._part_of_group(group), wrapped.averaged_gradients[group], parameters)
                for group, parameters in enumerate(wrapped.params_in_partition)
            )
        elif kind == "DeepSpeedZeroOptimizer_Stage3" and not offloaded:
            wrapped._get_norm_groups = lambda: [
                self._answer(
                    (self._part_of_group(wrapped.sub_group_to_group_id[group]), wrapped.averaged_gradients[group], own)
                    for group, own in enumerate(wrapped.fp16_groups)
                )
            ]
            wrapped.unscale_and_clip_grads = lambda *_: None  # nothing is scaled, and clipping is ours
        elif kind == "BF16_Optimizer":
            wrapped.step = self._bf16_step
        for name in ("allreduce_gradients", "_bf16_reduce_grads"):
            if hasattr(self._inner, name):
                setattr(self._inner, name, self._time_split.timed("reduce", getattr(self._inner, name)))
        if self.dims.pipeline_size > 1:
            self._inner._INSTRUCTION_MAP = {
                instruction: self._timed_instruction(instruction.__name__, run)
                for instruction, run in self._inner._INSTRUCTION_MAP.items()
            }

    def _timed_instruction(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        part = OF_A_PIPELINE[name]

        def timed(engine: Any, *arguments: Any, **named: Any) -> Any:
            if part == "step":
                self._do_meanwhile()
            with self._time_split.part(part):
                return run(engine, *arguments, **named)

        return timed

    @torch.no_grad()
    def _bf16_step(self, closure: Any = None) -> None:
        """`BF16_Optimizer.step`, asking for the norm once."""
        assert closure is None
        wrapped, rank = self._inner.optimizer, self.dims.tensor_rank
        shares = self._shares(
            (self._part_of_group(group), of_partition(wrapped.fp32_groups_gradients[group], parameters, rank))
            for group, parameters in enumerate(wrapped.bf16_groups)
        )
        self._ask(shares / self.dims.data_size)  # every data-parallel rank has them all
        wrapped._global_grad_norm = self._norms[0]
        assert self._applies is not None
        if any(self._applies):
            for partition, gradient in zip(
                wrapped.fp32_groups_flat_partition, wrapped.fp32_groups_gradient_flat_partition, strict=True
            ):
                partition.grad = gradient
            wrapped.optimizer.step()
            wrapped._lazy_init_hp_params_optimizer_state()
            wrapped.update_lp_params()
        else:
            wrapped.clear_lp_grads()
        wrapped.clear_hp_grads()

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """ZeRO calls the plain optimizer once per parameter group: the first call of a step decides for all."""
        groups = [(group[PART], [p for p in group["params"] if p.grad is not None]) for group in optimizer.param_groups]
        if self._applies is None:
            if self._zero_stage == 0:
                rank = self.dims.tensor_rank
                shares = self._shares((part, of_parameters(parameters, rank)) for part, parameters in groups)
                self._ask(shares / self.dims.data_size)
            else:  # state that is offloaded: DeepSpeed knows the norm, the same on every rank
                norm = torch.as_tensor(self._inner.optimizer._global_grad_norm, dtype=torch.float64, device=self.device)
                self._ask(norm.square()[None] / self.dims.world_size)
        assert self._applies is not None
        for part, applies in enumerate(self._applies):
            parameters = [parameter for number, own in groups if number == part for parameter in own]
            if applies:
                clip_gradients(parameters, self._norms[part], self._clip_grad)
                continue
            for parameter in parameters:
                parameter.grad = None

    @property
    def every_data_rank_holds_all(self) -> bool:
        return self._zero_stage == 0

    def is_tied_copy(self, parameter: nn.Parameter) -> bool:
        return is_tied_copy(parameter)

    def optimizer_steps(self) -> int:
        # The largest: a partition of nothing but padding starts to count at 0 again after a resume.
        steps = (int(state["step"]) for part, state in self._states() if part == 0)
        return max(steps, default=0)

    def set_optimizer_steps(self, steps: Sequence[int]) -> None:
        for part, state in self._states():
            state["step"].fill_(steps[part])

    def _states(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The plain optimizer's states of tensors, and of which part each is."""
        if self._zero_stage == 3:  # a group has its tensors only while it is stepped
            wrapped = self._inner.optimizer
            groups = wrapped.sub_group_to_group_id
            held = [(groups[sub], flat) for sub, flat in enumerate(wrapped.fp32_partitioned_groups_flat)]
        else:
            held = [(number, p) for number, group in enumerate(self._plain.param_groups) for p in group["params"]]
        for group, tensor in held:
            state = self._plain.state.get(tensor)
            if state:
                yield self._part_of_group(group), state

    def _part_of_group(self, group: int) -> int:
        """Of which part a group of the plain optimizer is."""
        return int(self._plain.param_groups[group][PART])

    def set_weight(self, parameter: nn.Parameter, local: torch.Tensor) -> None:
        with torch.no_grad():
            if hasattr(parameter, "ds_tensor"):
                partition = parameter.ds_tensor
                begin = _zero3_start(parameter)
                mine = local[begin : begin + partition.numel()]
                partition.data.view(-1)[: mine.numel()].copy_(mine)
            else:
                parameter.data.view(-1).copy_(local)

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        wrapped: Any = self._inner.optimizer
        if hasattr(parameter, "ds_tensor"):
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            group, offset, padded = wrapped.grad_position[wrapped.get_param_id(parameter)]
            start = _zero3_start(parameter)
            size = min(padded, int(parameter.ds_numel) - start)  # type: ignore[attr-defined]
            flat = wrapped.fp32_partitioned_groups_flat[group]
            if size <= 0:
                return None
        elif self._zero_stage > 0:
            shape = tuple(parameter.shape)
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
            flat = self._plain.param_groups[mapping.param_group_index]["params"][0]
        else:
            shape, start, offset, size, flat = tuple(parameter.shape), 0, 0, parameter.numel(), parameter
        state = ensure_state(self._plain, flat)
        values = {WEIGHT: flat, **{key: state[key] for key in MOMENTS}}
        views = {key: value.detach().view(-1).narrow(0, offset, size) for key, value in values.items()}
        return Fragment(name, shape, start, views)


def _gather_what_is_read_directly(module: nn.Module) -> None:
    """Under ZeRO-3, a fused objective reads weights outside their modules: they are gathered while it runs."""
    from deepspeed.runtime.zero import register_external_parameter

    for part in module.modules():
        if isinstance(part, FusedObjective):
            for read in part.read_directly():
                for parameter in read.parameters():
                    register_external_parameter(part, parameter)


def without_waiting(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on the device; the host does not wait until they are there."""
    if values.device.type == device.type:
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _pipeline_batches(
    micro_batches: Sequence[Batch], weights: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return iter([(batch.message, weights) for batch in micro_batches])


def _zero3_start(parameter: nn.Parameter) -> int:
    from deepspeed import comm

    return int(parameter.ds_tensor.numel()) * comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
