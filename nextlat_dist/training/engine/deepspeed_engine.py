"""The DeepSpeed binding of `protocol.Engine`: the only file that knows what DeepSpeed keeps where.

Steps: all of ZeRO 0-3 and pipelines end in the `step` of the plain optimizer that we built. A hook before it knows the
gradient norm, asks the judge, and takes the gradients away if the answer is no; AdamW passes over a parameter without
one (zeroed gradients would still decay weights and moments). DeepSpeed leaves a step whose norm is not finite before it
gets there; the judge is then asked afterwards. Under ZeRO 0 norm and clipping are ours: DeepSpeed's own fp32 clipping
keeps no norm and counts a tied embedding once per pipeline stage that holds it.

State:
- ZeRO 0: the parameters themselves and the plain optimizer's state; every data-parallel rank has all of it.
- ZeRO 1 and 2, and DeepSpeed's bf16 optimizer: a flat partition per parameter group and rank.
- ZeRO 3: a flat partition per sub-group and rank, with a padded share of every parameter.

Written for DeepSpeed 0.19.8, whose `safe_get_full_optimizer_state` fails for all groups but the first after the first
step, and whose own checkpoints are pickles that only the same layout can read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, Fragment
from nextlat_dist.model.layer_list import LayerEntry
from nextlat_dist.model.rows import Batch
from nextlat_dist.model.sharding import Rules
from nextlat_dist.parallel.dims import ModelParallelUnit, ParallelDims
from nextlat_dist.training.engine.optimizer import set_learning_rate
from nextlat_dist.training.engine.partial import sum_partial_gradients
from nextlat_dist.training.engine.protocol import Judge
from nextlat_dist.training.engine.step_terms import StepTerms


@contextmanager
def without_extension() -> Iterator[None]:
    """Inside, DeepSpeed does not load its CPU extension `deepspeed_shm_comm`.

    That one reduces tensors in inference engines alone; training never calls it. Loading it takes a C++ compiler and
    minutes at the first start, waits in silence where a killed build left its lock, and leaves 66 MB per rank in
    /dev/shm at every start, for good: DeepSpeed 0.19.8 never removes them.
    """
    from deepspeed.ops import __compatible_ops__ as loadable

    name = "deepspeed_shm_comm"
    known, loadable[name] = loadable.get(name), False
    try:
        yield
    finally:
        if known is None:
            del loadable[name]
        else:
            loadable[name] = known


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
        clip_grad: float,
    ) -> None:
        """Wraps `module`, whose weights are drawn.

        Args:
            optimizer: over `module`'s parameters; DeepSpeed may wrap it.
            step_terms: the loss function of `module`, if that is a pipeline.
            settings: for `deepspeed.initialize`; see `deepspeed_config`.
            terms: length of the vector of terms.
            clip_grad: global gradient norm, for ZeRO 0; 0: no clipping.
        """
        import deepspeed

        self.dims, self._sharding = dims, sharding
        self._plain, self._step_terms, self._terms, self._clip_grad = optimizer, step_terms, terms, clip_grad
        unit = ModelParallelUnit() if dims.pipeline_size == 1 else None
        self._inner, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, mpu=unit, dist_init_required=False, config=settings
        )
        self._zero_stage = int(self._inner.zero_optimization_stage())
        self._judge: Judge | None = None
        self._applies: bool | None = None  # what the judge said of the step under way
        self._norm = math.inf
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

    def close(self) -> None:
        # DeepSpeed's hooks on gradients stand in the autograd graph, where no garbage collection sees that they and the
        # engine hold one another: the model, its optimizer and its groups' threads would stay as long as the process.
        # Under ZeRO-3 they still do: DeepSpeed 0.19.8 leaves more of them than it removes.
        self._inner.destroy()

    def set_learning_rate(self, value: float) -> None:
        set_learning_rate(self._inner.optimizer, value)

    def gradient_norm(self) -> float:
        return self._norm

    def train_step(
        self, micro_batches: Sequence[Batch], weights: torch.Tensor, judge: Judge | None = None
    ) -> torch.Tensor:
        self._judge, self._applies = judge, None
        # DeepSpeed averages over accumulation steps and data-parallel ranks; our weights are already global.
        scaled = (weights * len(micro_batches) * self.dims.data_size).float().to(self.device)
        if self.dims.pipeline_size > 1:
            self._inner.train_batch(_pipeline_batches(micro_batches, scaled))
        else:
            self._inner.train()
            for batch in micro_batches:
                loss = self._step_terms(self._inner(batch.message), scaled)
                self._inner.backward(loss)
                self._inner.step()
        if self._applies is None:  # DeepSpeed left the step by itself
            self._ask(math.inf)
        return self._step_terms.take(self._terms, self.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        weights = torch.zeros(self._terms, device=self.device)
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

    def _ask(self, norm: float) -> None:
        self._norm = norm
        sums = self._step_terms.peek(self._terms, self.device)
        self._applies = self._judge is None or self._judge(sums, norm)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """ZeRO calls the plain optimizer once per parameter group: the first call of a step decides for all."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._applies is None:
            if self._zero_stage == 0:
                norm = global_gradient_norm(parameters, self.dims.model_group, self.dims.tensor_rank, self.device)
            else:
                norm = float(self._inner.optimizer._global_grad_norm)
            self._ask(norm)
        if not self._applies:
            for parameter in parameters:
                parameter.grad = None
        elif self._zero_stage == 0:
            clip_gradients(parameters, self._norm, self._clip_grad)

    @property
    def every_data_rank_holds_all(self) -> bool:
        return self._zero_stage == 0

    def is_tied_copy(self, parameter: nn.Parameter) -> bool:
        return _is_tied_copy(parameter)

    def optimizer_steps(self) -> int:
        # The largest: a partition of nothing but padding starts to count at 0 again after a resume.
        return max((int(state["step"]) for state in self._plain.state.values() if state), default=0)

    def set_optimizer_steps(self, steps: int) -> None:
        for state in self._plain.state.values():
            state["step"].fill_(steps)

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
        state = _ensure_state(self._plain, flat)
        values = {WEIGHT: flat, **{key: state[key] for key in MOMENTS}}
        views = {key: value.detach().view(-1).narrow(0, offset, size) for key, value in values.items()}
        return Fragment(name, shape, start, views)


def pipeline_module(entries: list[LayerEntry], dims: ParallelDims, loss: StepTerms) -> nn.Module:
    """The layer list as a DeepSpeed pipeline with `loss` at its end."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    specs = [
        LayerSpec(entry.cls, **entry.arguments)
        if entry.tied_key is None
        else TiedLayerSpec(
            entry.tied_key,
            entry.cls,
            forward_fn=entry.forward_fn,
            # Only this attribute is synchronised; the embedding module holds nothing else.
            tied_weight_attr=["word_embeddings.weight"],
            **entry.arguments,
        )
        for entry in entries
    ]
    topology = PipeModelDataParallelTopology(num_pp=dims.pipeline_size, num_mp=dims.tensor_size, num_dp=dims.data_size)
    module = PipelineModule(specs, topology=topology, loss_fn=loss, partition_method="type:DecoderLayer")
    grid = module.mpu()
    assert grid.get_slice_parallel_rank() == dims.tensor_rank
    assert grid.get_data_parallel_rank() == dims.data_rank
    assert grid.get_stage_id() == dims.pipeline_rank
    # A message between stages is (hidden, message of the batch): no stage may begin after the last decoder layer.
    last_decoder_layer = max(i for i, entry in enumerate(entries) if entry.cls.__name__ == "DecoderLayer")
    assert all(0 < start <= last_decoder_layer for start in module.parts[1:-1]), module.parts
    return module


def global_gradient_norm(
    parameters: Iterable[nn.Parameter],
    model_group: dist.ProcessGroup,
    tensor_rank: int,
    device: torch.device | None = None,
) -> float:
    """L2 norm over every distinct parameter: replicated ones count once, tied ones on their first stage.

    `device`: the rank's, where the sum is exchanged; a rank whose parameters all count elsewhere exchanges a zero.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        assert parameter.grad is not None
        if _is_tied_copy(parameter):
            continue
        if tensor_rank != 0 and not getattr(parameter, "tensor_model_parallel", False):
            continue
        total = total + parameter.grad.detach().double().square().sum()
    dist.all_reduce(total, group=model_group)
    return float(total.sqrt())


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients of global `norm` down to `max_norm`; 0: leave them."""
    if 0 < max_norm < norm:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(max_norm / (norm + 1e-6))


def _pipeline_batches(
    micro_batches: Sequence[Batch], weights: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return iter([(batch.message, weights) for batch in micro_batches])


def _is_tied_copy(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def _ensure_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    """AdamW makes its state in its first step; this is the same a step early.

    `fused` and `capturable` count the steps on the device and refuse a count on the host.
    """
    state: dict[str, Any] = optimizer.state[flat]
    if not state:
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def _zero3_start(parameter: nn.Parameter) -> int:
    from deepspeed import comm

    return int(parameter.ds_tensor.numel()) * comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
